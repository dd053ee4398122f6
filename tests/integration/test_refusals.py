"""An invalid request ends with one line and exit code 2, soon after the command."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring import preflight as scoring
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.preflight import preflight
from tests.integration.conftest import run_job


@pytest.fixture
def folder(tmp_path: Path, sample: pa.Table, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a usable file, one that was cut off, an empty folder, a folder in use and a config file."""
    for name in ("pairs", "cut", "empty", "runs/used"):
        (tmp_path / name).mkdir(parents=True)
    pq.write_table(sample[::500].append_column("number", pa.array([1] * 10)), tmp_path / "pairs" / "a.parquet")
    whole = (tmp_path / "pairs" / "a.parquet").read_bytes()
    (tmp_path / "cut" / "a.parquet").write_bytes(whole[:1000])
    (tmp_path / "runs" / "used" / "notes.txt").write_text("somebody's")
    (tmp_path / "run.yaml").write_text("epohs: 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--epochs 0", "--epochs: input should be greater than or equal to 1"),
        ("--mlflow https://me:secret@host", "--mlflow: must be http(s)://HOST:PORT or sqlite:///FILE; keys belong in"),
        ("--config run.yaml", "'epohs' of the config file: there is no such setting"),
        ("--data nowhere", "nowhere: there is no such file or folder"),
        ("--data cut", "is not Parquet, or was cut off"),
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
        ({"--input": "nowhere"}, "--input nowhere: there is no "),
        ({"--input": "empty"}, "there is no Parquet file"),
        ({"--input": "empty/*.parquet"}, "there is no Parquet file"),
        ({"--number-column": "addend"}, "--number-column addend: no file of --input has such a column"),
        ({"--label-column": "truth"}, "--label-column truth: no file of --input has such a column"),
        ({"--output": "pairs/out"}, "lies in the input pairs"),
        ({"--output": "."}, "holds the input file"),
        ({"--output": "pairs/a.parquet"}, "is a file; name a folder"),
        ({"--model": "empty"}, "holds no model"),
        ({"--max-rows-per-file": "0"}, "--max-rows-per-file: input should be greater than or equal to 1"),
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


def test_a_command_says_so_at_once(folder: Path, model: Path) -> None:
    run_job("train", "--data", "cut", cwd=folder).check_refused("is not Parquet, or was cut off")
    flags = ["--model", model, "--input", "pairs", "--output", "pairs/out"]
    run_job("score", *flags, cwd=folder).check_refused("lies in the input pairs")


def test_an_invalid_row(tmp_path: Path, sample: pa.Table, cluster: str) -> None:
    rows = sample[::50].to_pylist()
    rows[42]["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "a.parquet")
    done = run_job("train", "--data", tmp_path, "--storage-path", tmp_path / "runs", address=cluster)
    done.check_refused("a.parquet: row 42: the digit is 11, not one of 0..9")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_invalid_held_out_row_of_streamed_files_is_named_at_the_first_attempt(
    tmp_path: Path, sample: pa.Table, cluster: str
) -> None:
    rows = sample[::25].to_pylist()
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "train.parquet", row_group_size=20)
    rows[42]["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "test.parquet")
    done = run_job("train", "--data", tmp_path, "--shuffle-rows", 100, "--storage-path", tmp_path / "runs", address=cluster)
    assert done.code == 1
    assert "test.parquet: row 42: the digit is 11, not one of 0..9" in done.error
    assert "Traceback" not in done.err
    assert done.err.count("worker 0 failed: ") <= 1, "another attempt would fail in the same way"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-workers", 64], "--num-workers 64: needs 64 CPUs, one a worker; the cluster has 2 CPUs and 0 GPUs on 1 node"),
        (["--use-gpu", "true"], "--use-gpu true: the cluster has no GPU"),
    ],
)
def test_more_than_the_cluster_has(tmp_path: Path, cluster: str, flags: list[object], message: str) -> None:
    run_job("train", "--data", "sample", "--storage-path", tmp_path, *flags, address=cluster).check_refused(message)


def test_an_output_that_cannot_be_written(folder: Path, model: Path, cluster: str) -> None:
    flags = ["--model", model, "--input", folder / "pairs", "--output", "/proc/out"]
    run_job("score", *flags, address=cluster).check_refused("--output /proc/out: cannot be written")


def test_a_run_folder_that_another_run_holds(tmp_path: Path, cluster: str) -> None:
    flags = ["--data", "sample", "--storage-path", tmp_path, "--name", "mine"]
    with folder_lock(locate(str(tmp_path / "mine"), "--name"), "--name", print):
        run_job("train", *flags, address=cluster).check_refused(f"error: --name {tmp_path}/mine: another run (")


@pytest.mark.slow
def test_busy_cpus_are_waited_for_until_the_time_limit(tmp_path: Path, cluster: str) -> None:
    class Holder:
        def ready(self) -> bool:
            return True

    holder = ray.remote(num_cpus=2)(Holder).remote()
    assert ray.get(holder.ready.remote())
    try:
        done = run_job("train", "--data", "sample", "--storage-path", tmp_path, "--wait-seconds", 3, address=cluster)
    finally:
        ray.kill(holder)
    assert done.code == 2
    waiting, refused = done.err.strip().splitlines()
    assert waiting.startswith("waiting for 1 CPU; free now: 0 CPUs")
    assert refused.startswith("error: needs 1 CPU, but after 3 s only 0 CPUs are free")
    assert not list(tmp_path.iterdir())
