"""An invalid request, or one that cannot be met now, ends with one line soon after the command."""

from pathlib import Path

import pytest
import ray

from mnistsum_ray.api import fit
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import TryAgainError
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import run_job


def test_a_command_says_so_at_once(tmp_path: Path) -> None:
    """With one line, and before anything large is done: in a minute, also where a machine is slow."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    done = run_job("train", "--data", tmp_path)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert "a.parquet" in done.error
    assert done.seconds < 60


@pytest.mark.usefixtures("cluster")
def test_a_folder_that_another_run_holds(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    with (
        folder_lock(locate(str(run), "--name"), "--name", print),
        pytest.raises(
            TryAgainError, match=rf"^--name {run}: another run \(.*\) is writing there; wait for it"
        ),
    ):
        fit(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine"))


@pytest.mark.usefixtures("cluster")
def test_busy_cpus_are_waited_for_until_the_time_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.__ray_ready__.remote())
    try:
        with pytest.raises(
            TryAgainError, match=r"^needs 0.75 CPUs, but after 3 s only 0 CPUs and 0 GPUs are free"
        ):
            fit(TrainConfig(data="sample", storage_path=str(tmp_path), wait_seconds=3))
    finally:
        ray.kill(holder)
    assert "  waiting for 0.75 CPUs; free now: 0 CPUs" in capsys.readouterr().err


class Holder:
    """Another job's actor."""
