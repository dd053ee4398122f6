"""An invalid request ends with one line and exit code 2, soon after the command."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.api import run_training
from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ExportPairsConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.scoring import preflight as scoring
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.preflight import preflight
from tests.integration.conftest import run_job, score_here


@pytest.fixture
def folder(tmp_path: Path, sample: pa.Table, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a usable file, one that was cut off, and a folder in use."""
    for name in ("pairs", "cut", "runs/used"):
        (tmp_path / name).mkdir(parents=True)
    pq.write_table(sample[::500].append_column("number", pa.array([1] * 10)), tmp_path / "pairs" / "a.parquet")
    whole = (tmp_path / "pairs" / "a.parquet").read_bytes()
    (tmp_path / "cut" / "a.parquet").write_bytes(whole[:1000])
    (tmp_path / "runs" / "used" / "notes.txt").write_text("somebody's")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--mlflow https://me:secret@host", "--mlflow: must be http(s)://HOST:PORT or sqlite:///FILE; keys belong in"),
        ("--name unknown --resume", "there is no run in"),
        ("--data sample --name used", "--name used:"),
    ],
)
def test_training_requests_that_need_no_cluster(folder: Path, args: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        preflight(parse(TrainConfig, args.split(), ""))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--label-column": "truth"}, "--label-column truth: no file of --input has such a column"),
        ({"--output": "pairs/out"}, "lies in the input pairs"),
        ({"--output": "pairs/a.parquet"}, "is a file; name a folder"),
    ],
    ids=str,
)
def test_scoring_requests_that_need_no_cluster(folder: Path, model: Path, changed: dict[str, str], message: str) -> None:
    flags = {"--model": str(model), "--input": "pairs", "--output": "out"} | changed
    with pytest.raises(RequestError) as refused:
        scoring.preflight(parse(ScoreConfig, [word for flag in flags.items() for word in flag], ""))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (folder / "out").exists()


def test_a_command_says_so_at_once(folder: Path) -> None:
    run_job("train", "--data", "cut", cwd=folder).check_refused("is not Parquet, or was cut off")


@pytest.mark.usefixtures("cluster")
def test_an_invalid_row(tmp_path: Path, sample: pa.Table) -> None:
    rows = sample[::50].to_pylist()
    rows[42]["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"a\.parquet: row 42: the digit is 11, not one of 0\.\.9"):
        run_training(TrainConfig(data=str(tmp_path), storage_path=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


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
        with pytest.raises(RequestError, match=r"^needs 1 CPU, but after \d s only 0 CPUs are free"):
            run_training(TrainConfig(data="sample", storage_path=str(tmp_path), wait_seconds=3))
    finally:
        ray.kill(holder)
    assert capsys.readouterr().err.startswith("waiting for 1 CPU; free now: 0 CPUs")
    assert not list(tmp_path.iterdir())


class Holder:
    """Another job's actor."""
