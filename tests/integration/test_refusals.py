"""An invalid request ends with one line and exit code 2, within ten seconds of the command."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.integration.conftest import Done, run_job

Rows = Callable[[int], Path]


def check_refused(done: Done, message: str, seconds: float = 10) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert message in done.err
    assert done.seconds < seconds


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epohs", "3"], "--epohs"),
        (["--epochs", "0"], "--epochs: input should be greater than or equal to 1"),
        (["--mlflow", "https://me:secret@host"], "--mlflow: must be http(s)://HOST:PORT or sqlite:///FILE; keys belong in"),
        (["--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["--name", "unknown", "--resume"], "there is no run in"),
    ],
)
def test_training_requests_that_need_no_cluster(tmp_path: Path, args: list[str], message: str) -> None:
    check_refused(run_job("train", *args, "--storage-path", tmp_path), message)


def test_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epohs: 3\n")
    check_refused(run_job("train", "--config", tmp_path / "run.yaml"), "'epohs' of the config file: there is no such setting")


def test_a_name_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("somebody's")
    check_refused(run_job("train", "--data", "sample", "--storage-path", tmp_path, "--name", "mine"), "--name mine:")


def test_a_truncated_file(tmp_path: Path, write_rows: Rows) -> None:
    path = write_rows(100)
    path.write_bytes(path.read_bytes()[:1000])
    check_refused(run_job("train", "--data", path.parent, "--storage-path", tmp_path / "runs"), "is not Parquet, or was cut off")


def test_an_invalid_row(tmp_path: Path, sample: pa.Table, cluster: str) -> None:
    rows = sample[::50].to_pylist()
    rows[42]["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, sample.schema), tmp_path / "a.parquet")
    done = run_job("train", "--data", tmp_path, "--storage-path", tmp_path / "runs", address=cluster)
    check_refused(done, "a.parquet: row 42: the digit is 11, not one of 0..9", seconds=15)
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["_lock"]


def test_more_workers_than_the_cluster_can_have(tmp_path: Path, cluster: str) -> None:
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, "--num-workers", 64, address=cluster)
    check_refused(done, "--num-workers 64: needs 64 CPUs, one a worker; the cluster has 2 CPUs and 0 GPUs on 1 node")


def test_gpus_where_there_are_none(tmp_path: Path, cluster: str) -> None:
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, "--use-gpu", "true", address=cluster)
    check_refused(done, "--use-gpu true: the cluster has no GPU")


def test_busy_cpus_are_waited_for_until_the_time_limit(tmp_path: Path, cluster: str) -> None:
    class Holder:
        def ready(self) -> bool:
            return True

    holder = ray.remote(num_cpus=2)(Holder).remote()
    assert ray.get(holder.ready.remote())
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, "--wait-seconds", 3, address=cluster)
    ray.kill(holder)
    assert done.code == 2
    waiting, refused = done.err.strip().splitlines()
    assert waiting.startswith("waiting for 1 CPU; free now: 0 CPUs")
    assert refused.startswith("error: needs 1 CPU, but after 3 s only 0 CPUs are free")
    assert not list(tmp_path.iterdir())


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
        ({"--model": "pairs"}, "holds no model"),
        ({"--model": "empty"}, "holds no model"),
        ({"--max-rows-per-file": "0"}, "--max-rows-per-file: input should be greater than or equal to 1"),
    ],
    ids=str,
)
def test_invalid_scoring_requests(tmp_path: Path, sample: pa.Table, model: Path, changed: dict[str, str], message: str) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "empty").mkdir()
    pq.write_table(sample[::500].append_column("number", pa.array([1] * 10)), tmp_path / "pairs" / "a.parquet")
    flags = {"--model": str(model), "--input": "pairs", "--output": "out"} | changed
    check_refused(run_job("score", *(word for flag in flags.items() for word in flag), cwd=tmp_path), message)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, sample: pa.Table, model: Path, cluster: str) -> None:
    pq.write_table(sample[::500].append_column("number", pa.array([1] * 10)), tmp_path / "a.parquet")
    flags = ["--model", model, "--input", tmp_path / "a.parquet", "--output", "/proc/out"]
    check_refused(run_job("score", *flags, address=cluster), "--output /proc/out: cannot be written")
