"""An invalid request ends with one line and exit code 2, soon after the command."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.api import run_training
from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ExportPairsConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError, RunError, TryAgainError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.scoring.preflight import preflight
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
from tests.integration.conftest import run_job, score_here


def test_an_output_that_is_a_file_and_keys_in_a_uri_of_mlflow(model: Path, tmp_path: Path, sample: pa.Table) -> None:
    """They need no cluster. More of them are in the tests of the packages."""
    with pytest.raises(RequestError, match=r"--mlflow: must be http\(s\)://HOST:PORT or sqlite:///FILE; keys belong in"):
        parse(TrainConfig, ["--mlflow", "https://me:secret@host"], "")
    file = tmp_path / "a.parquet"
    pq.write_table(sample[::500].append_column("number", pa.array([1] * 10)), file)
    with pytest.raises(RequestError, match="is a file; name a folder"):
        preflight(ScoreConfig(model=str(model), input=(str(file),), output=str(file)))


def test_a_command_says_so_at_once(tmp_path: Path) -> None:
    """With one line, and before anything large is done: in a minute, also where a machine is slow."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    done = run_job("train", "--data", tmp_path)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert "a.parquet" in done.error
    assert done.seconds < 60


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_invalid_held_out_row_of_streamed_files_is_named_at_the_first_attempt(
    tmp_path: Path, sample: pa.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sample[::25].to_pylist()
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "train.parquet", row_group_size=20)
    rows[42]["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "test.parquet")
    with pytest.raises(RunError, match=r"test\.parquet: row 42: the digit is 11, not one of 0\.\.9"):
        run_training(TrainConfig(data=str(tmp_path), shuffle_rows=100, storage_path=str(tmp_path / "runs")))
    assert capsys.readouterr().err.count("worker 0 failed: ") <= 1, "another attempt would fail in the same way"


@pytest.mark.usefixtures("cluster")
def test_a_run_folder_that_another_run_holds(tmp_path: Path) -> None:
    with (
        folder_lock(locate(str(tmp_path / "mine"), "--name"), "--name", print),
        pytest.raises(RequestError, match=rf"^--name {tmp_path}/mine: another run \("),
    ):
        run_training(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine"))


@pytest.mark.usefixtures("cluster")
def test_an_output_that_another_run_holds(model: Path, tmp_path: Path) -> None:
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=10), print)
    with (
        folder_lock(locate(str(tmp_path / "out"), "--output"), "--output", print),
        pytest.raises(RequestError, match=r"^--output .*: another run \(.*\) is writing there; wait for it, or choose another"),
    ):
        score_here(model, tmp_path / "out", tmp_path / "in", num_workers=1000)  # the lock comes before workers are asked for
    assert not (tmp_path / "out").exists(), "nothing was written, and the holder's lock goes with its folder"


@pytest.mark.usefixtures("cluster")
def test_busy_cpus_are_waited_for_until_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.__ray_ready__.remote())
    try:
        with pytest.raises(TryAgainError, match=r"^needs 0.75 CPUs, but after 3 s only 0 CPUs and 0 GPUs are free"):
            run_training(TrainConfig(data="sample", storage_path=str(tmp_path), wait_seconds=3))
    finally:
        ray.kill(holder)
    assert capsys.readouterr().err.startswith("waiting for 0.75 CPUs; free now: 0 CPUs")
    assert not list(tmp_path.iterdir())


class Holder:
    """Another job's actor."""
