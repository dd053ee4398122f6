"""The private APIs of Ray, run against the installed Ray: a failure shows what its version has changed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray.data import Dataset
from ray.data._internal.execution.node_trackers import actor_location

from mnistsum_ray.cluster import ray_internals
from mnistsum_ray.cluster.connection import connect, disconnect
from mnistsum_ray.training.ray_hooks import InterruptibleTrainer, placement_groups, remove_placement_groups


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """A cluster of this process."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        connect()
    yield
    disconnect()


@pytest.mark.usefixtures("started")
def test_small_cluster() -> None:
    listed = subprocess.run(["ps", "-wwo", "sid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
    sessions = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    for program in ("gcs_server", "raylet"):
        leaders = [int(session) for session, command in sessions if program in command]
        assert leaders, f"Ray {ray.__version__} no longer starts {program} from the driver"
        assert os.getsid(0) not in leaders, f"Ray {ray.__version__} no longer starts {program} with services.ConsolePopen"
    assert not [command for _, command in sessions if "monitor.py" in command or "dashboard.py" in command]


@pytest.mark.usefixtures("started")
def test_errors_of_rays_processes_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Ray prints to each driver that listens that a process has died, and that there are retries."""
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(ray.remote(max_retries=1)(lambda: os._exit(1)).remote())
    time.sleep(1)
    assert "raylet" not in "".join(capfd.readouterr())


def test_ray_train_still_has_the_hooks_and_the_callbacks_by_their_names(tmp_path: Path) -> None:
    theirs = ray.train.torch.TorchTrainer
    assert hasattr(theirs, "_register_sigint_handler"), "or Ctrl-C ends the driver with exit code 0"
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    left, all_of_them = (
        [type(callback).__name__ for callback in kind(lambda: None, **settings)._create_default_callbacks()]
        for kind in (InterruptibleTrainer, theirs)
    )
    assert [name for name in all_of_them if name not in left] == ["PlacementGroupCleanerCallback", "DatasetsCallback"], (
        "InterruptibleTrainer must be adapted, or another Ray cluster on the machine ends the training"
    )


@pytest.mark.usefixtures("started")
def test_placement_groups_that_ray_train_has_left_are_removed() -> None:
    """Those that were there before belong to the caller of `fit`, and stay."""
    rest = ray.cluster_resources()["CPU"] - 0.01
    of_caller = ray.util.placement_group([{"CPU": 0.01}])
    ray.get(of_caller.ready())
    before = placement_groups()
    ray.get(ray.util.placement_group([{"CPU": rest}]).ready())
    remove_placement_groups(but=before)
    assert ray.get(ray.remote(num_cpus=rest)(lambda: True).remote(), timeout=30)
    assert placement_groups() == before == {of_caller.id.hex()}
    ray.util.remove_placement_group(of_caller)


_CONSUME_SLOWLY = """
import time
import numpy as np
import ray
from mnistsum_ray.cluster.tasks import ray_data_options

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
    done = subprocess.run([sys.executable, "-c", _CONSUME_SLOWLY], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.5, done.stderr


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("owner", "name", "call", "expected"),
    [
        (ray._raylet, "Config", ray_internals.reload_authentication, None),
        (ray._raylet, "GcsClient", lambda: ray_internals.rejects_this_client("127.0.0.1:9"), False),
        (actor_location, "get_or_create_actor_location_tracker", ray_internals.detached_data_actors, None),
        (Dataset, "copy", lambda: ray_internals.in_order(ray.data.range(1)).context.execution_options.preserve_order, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_that_ray_no_longer_has_is_done_without(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: Callable[[], object], expected: object
) -> None:
    """Those that a training without them does not meet, see below."""
    monkeypatch.delattr(owner, name)
    assert call() == expected


def test_the_scheduling_loop_may_have_other_hooks_and_attributes() -> None:
    callback = ray_internals.PatientExecution()
    callback.on_execution_step(object())
    callback.a_new_hook("executor", "event")


@pytest.mark.slow
def test_a_job_runs_to_its_end_without_any_private_name(tmp_path: Path) -> None:
    flags = ["train", "--data", "sample", "--epochs", "1", "--sum-head-steps", "5", "--storage-path", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.cluster.without_private_names", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["rows"] == 500
    assert done.stderr.splitlines()[-1].split() == [
        "AuthenticationTokenLoader",
        "ConsolePopen",
        "_record",
        "get_entrypoint_name",
        "listen_error_messages",
        "read_ray_address",
        "state",
    ]
