"""The private APIs of Ray, run against the installed Ray. A failure names Ray's version and the API that it has changed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from mnistsum_ray.cluster import ray_internals


@contextmanager
def uses(api: str) -> Iterator[None]:
    """Fail with Ray's version and this API if the block raises."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"Ray {ray.__version__} has changed {api} (read in 2.60.0): {type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a cluster with token authentication, whose processes run in sessions of their own."""
    with ray_internals.side_effects_undone():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        with uses("ray._raylet.Config.initialize or AuthenticationTokenLoader.reset_cache"):
            ray_internals.reload_authentication()
        with uses("ray._private.services.ConsolePopen"), ray_internals.ray_processes_in_own_sessions():
            context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context.address_info["address"]
    ray.shutdown()
    ray_internals.reload_authentication()


@pytest.mark.usefixtures("address")
def test_ray_processes_in_own_sessions() -> None:
    listed = subprocess.run(["ps", "-wwo", "sid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
    sessions = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    for program in ("gcs_server", "raylet"):
        leaders = [int(session) for session, command in sessions if program in command]
        assert leaders, f"Ray {ray.__version__} no longer starts {program} from the driver"
        assert os.getsid(0) not in leaders, f"Ray {ray.__version__} no longer starts {program} with services.ConsolePopen"


@pytest.mark.usefixtures("address")
def test_errors_of_rays_processes_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Ray prints to each driver that listens that a process has died, and that there are retries."""
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(ray.remote(max_retries=1)(lambda: os._exit(1)).remote())
    time.sleep(1)
    with uses("ray._private.worker.listen_error_messages"):
        assert "raylet" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("address")
def test_start_autoscaling_coordinator() -> None:
    with uses("ray.data._internal.cluster_autoscaler.get_or_create_autoscaling_coordinator"):
        ray_internals.start_autoscaling_coordinator()
    assert ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"), "the name that Ray Train asks for"


@pytest.mark.usefixtures("address")
def test_has_dashboard() -> None:
    """That it is true where there is one, tests/integration/test_metrics.py asks."""
    with uses("ray._private.worker.get_dashboard_url"):
        assert not ray_internals.has_dashboard()


def test_last_cluster_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with uses("ray._private.utils.read_ray_address"):
        assert ray_internals.last_cluster_address() is None
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")  # where `ray start` writes it
        assert ray_internals.last_cluster_address() == "10.0.0.1:6379"


def test_autoscaler_limits(address: str) -> None:
    with uses("ray._private.state.state.get_max_resources_from_cluster_config"):
        assert ray_internals.autoscaler_limits() == {}
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        group = autoscaler_pb2.NodeGroupConfig(name="workers", resources={"CPU": 8, "GPU": 1}, max_count=3)
        config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
        GcsClient(address=address).report_cluster_config(config.SerializeToString())  # as an autoscaler does
        assert ray_internals.autoscaler_limits() == {"CPU": 24, "GPU": 3}


_AUTHENTICATE = """
import os, sys
from mnistsum_ray.cluster import ray_internals
address = sys.argv[1]
before = ray_internals.rejects_this_client(address)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": sys.argv[2]}
ray_internals.reload_authentication()
print(before, ray_internals.rejects_this_client(address))
"""


@pytest.mark.parametrize(("token", "printed"), [("0" * 64, "True False"), ("1" * 64, "True True")], ids=["right", "wrong"])
def test_authentication(address: str, token: str, printed: str) -> None:
    """A client is rejected without the token and with a wrong one. It is accepted after it has reloaded the right one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", _AUTHENTICATE, address, token]
    done = subprocess.run(command, env=environment | {"HOME": "/nonexistent"}, capture_output=True, text=True)
    with uses("ray._raylet.GcsClient"):
        assert done.stdout.strip() == printed, done.stderr


_CONSUME_SLOWLY = """
import time
import numpy as np
import ray
from mnistsum_ray.cluster.data_context import ray_data_options

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
with ray_data_options(preserve_order=True, object_store_bytes=4_000_000):
    dataset = ray.data.range(40, override_num_blocks=40).map_batches(lambda batch: {"x": np.zeros((1, 1_000_000), np.uint8)})
blocks = iter(dataset.iter_batches(batch_size=None))
next(blocks)
before = time.process_time()
for _ in range(10):
    time.sleep(0.5)
    next(blocks)
print(time.process_time() - before)
"""


@pytest.mark.slow
def test_an_execution_that_waits_for_its_consumer_does_not_spin() -> None:
    """Without `PatientExecution` it takes most of these five seconds of a core, in the process of the consumer."""
    with uses("DataContext.custom_execution_callback_classes, StreamingExecutor._topology or its metrics"):
        done = subprocess.run([sys.executable, "-c", _CONSUME_SLOWLY], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.5, done.stderr
