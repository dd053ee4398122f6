"""Killed processes: after the same command again, the output has the bytes of an undisturbed run."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.storage.paths import locate
from tests.conftest import calibrate
from tests.integration.conftest import Job, descendants, kill_everything, kill_worker, report_duration, run_job

ROWS, FILES, PART_ROWS = 12_000, 6, 500

WORKER = "ray::MapWorker(MapBatches(Scorer))"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 rows, 30 of them bad."""
    folder = tmp_path_factory.mktemp("kills") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=FILES), print)
    for path in folder.iterdir():
        table = pq.read_table(path)
        numbers = pa.array(
            [None if row % 400 == 7 else number for row, number in enumerate(table["number"].to_pylist())], pa.int8()
        )
        pq.write_table(table.set_column(2, "number", numbers), path, row_group_size=300)
    return folder


def flags(model: Path, pairs: Path | str, output: Path | str) -> list[object]:
    return ["--model", model, "--input", pairs, "--output", output, "--max-rows-per-file", PART_ROWS, "--label-column", "digit"]


@pytest.fixture(scope="module")
def undisturbed(model: Path, pairs: Path) -> dict[str, bytes]:
    output = pairs.parent / "undisturbed"
    done = run_job("score", *flags(model, pairs, output))
    assert done.code == 3, done.err
    assert done.last_line["rejected_rows"] == 30
    return content(output)


def content(output: Path) -> dict[str, bytes]:
    """Every file but the manifest and the report, which hold the duration, and the lock."""
    timed = ("manifest.json", "report.html", "_lock")
    paths = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name not in timed)
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@contextmanager
def watched(output: Path) -> Iterator[None]:
    """Check while the block runs that every file with a final name is whole."""
    ended, torn = threading.Event(), list[str]()

    def watch() -> None:
        while not ended.wait(0.05):
            for path in output.rglob("[!.]*.parquet"):
                try:
                    pq.read_metadata(path)
                except FileNotFoundError:
                    continue
                except Exception as error:  # any error means that the file was not whole
                    torn.append(f"{path}: {error}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert not torn


def wait_for_files(output: Path, count: int, seconds: float = 60) -> None:
    started = time.monotonic()
    while len(list((output / "predictions").glob("part-*.parquet"))) < count:
        assert time.monotonic() - started < seconds
        time.sleep(0.05)


def finish(model: Path, pairs: Path, output: Path, undisturbed: dict[str, bytes]) -> None:
    done = run_job("score", *flags(model, pairs, output))
    assert done.code == 3, done.err
    line = done.last_line
    assert line["input_rows"] == line["scored_rows"] + line["rejected_rows"] == ROWS
    assert line["resumed_rows"] > 0
    assert content(output) == undisturbed


def test_kill_a_worker_then_the_driver_then_everything(
    model: Path, pairs: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    with watched(output):
        job = Job("score", *flags(model, pairs, output))
        wait_for_files(output, 3)
        kill_worker(job.process.pid, WORKER)
        wait_for_files(output, 8)
        below = descendants(job.process.pid)
        os.kill(job.process.pid, signal.SIGKILL)
        job.wait()

        job, again = Job("score", *flags(model, pairs, output)), time.monotonic()
        wait_for_files(output, len(list((output / "predictions").glob("part-*.parquet"))) + 1)
        report_duration("scoring, the driver killed: the next file, from the same command,", again)
        wait_for_files(output, 14)
        kill_everything(job.process.pid)
        job.wait()
        assert not (output / "manifest.json").exists()

        finish(model, pairs, output, undisturbed)
    for process in below:  # processes that Ray itself did not end
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_stopped_by_signals_the_same_command_goes_on(
    model: Path, pairs: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    with watched(output):
        for number in (signal.SIGTERM, signal.SIGHUP):
            there = len(list((output / "predictions").glob("part-*.parquet")))
            job = Job("score", *flags(model, pairs, output))
            wait_for_files(output, there + 2)
            os.killpg(job.process.pid, number)  # as a terminal does
            done = job.wait(timeout=60)
            job.check_nothing_left()
            assert (done.code, done.out) == (128 + number, "")
            last = f"stopped by {number.name}; committed files are kept, and the same command resumes"
            assert done.err.splitlines()[-1] == last
            assert "Traceback" not in done.err
            assert not (output / "manifest.json").exists(), "the manifest marks a finished output"
    finish(model, pairs, output, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_on_s3_everything_killed_changes_nothing(model: Path, pairs: Path) -> None:
    root = locate("s3://scores/kills", "--output")
    for path in pairs.iterdir():
        (root / "in" / path.name).write_bytes(path.read_bytes())
    alone, killed = (flags(model, f"{root.display}/in", f"{root.display}/{name}") for name in ("alone", "killed"))
    assert run_job("score", *alone).code == 3
    job = Job("score", *killed)
    while len([info for info in (root / "killed").files() if "/predictions/" in info.path]) < 8:
        assert job.process.poll() is None
        time.sleep(0.2)
    kill_everything(job.process.pid)
    job.wait()
    done = run_job("score", *killed)
    assert done.code == 3, done.err
    assert done.last_line["resumed_rows"] > 0
    one, other = (
        {info.path.removeprefix(place.path): place.at(info.path).read_bytes() for info in place.files() if "parquet" in info.path}
        for place in (root / "alone", root / "killed")
    )
    assert len(one) > ROWS / PART_ROWS
    assert one == other


@pytest.mark.slow
@pytest.mark.skipif(int8.unavailable_reason() is not None, reason="this PyTorch has no integer convolutions on this CPU")
def test_a_kill_before_the_last_file_changes_no_bit_with_8_bit_integers(tmp_path: Path, pairs: Path, model: Path) -> None:
    """The last file has two rows, which the undisturbed run predicts in one batch with the rows before them."""
    calibrated = calibrate(Path(shutil.copytree(model, tmp_path / "model")))
    (tmp_path / "in").mkdir()
    pq.write_table(pq.read_table(pairs / "part-00000.parquet").slice(0, 1002), tmp_path / "in" / "rows.parquet")
    flags = [
        "--model",
        calibrated,
        "--input",
        tmp_path / "in",
        "--max-rows-per-file",
        100,
        "--precision",
        "int8",
        "--num-workers",
        1,
    ]
    alone = run_job("score", *flags, "--output", tmp_path / "alone")
    assert alone.code == 3, alone.err
    files = sorted((tmp_path / "alone" / "predictions").iterdir())
    assert pq.read_metadata(files[-1]).num_rows < 100
    shutil.copytree(tmp_path / "alone", tmp_path / "out")
    for path in (tmp_path / "out" / "manifest.json", tmp_path / "out" / "predictions" / files[-1].name):
        path.unlink()
    assert run_job("score", *flags, "--output", tmp_path / "out").last_line["resumed_rows"] > 0
    assert content(tmp_path / "out") == content(tmp_path / "alone")


@pytest.mark.slow
def test_the_second_of_two_runs_on_one_output_is_refused(
    model: Path, pairs: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    done = [job.wait() for job in [Job("score", *flags(model, pairs, output)) for _ in range(2)]]
    assert sorted(job.code for job in done) == [2, 3], [job.err for job in done]
    (refused,) = [job for job in done if job.code == 2]
    assert f"error: --output {output}: another run" in refused.err
    assert "is writing there" in refused.err
    assert content(output) == undisturbed


def has_open(process: int, file: Path) -> bool:
    """Return whether a process has the file open."""
    with suppress(OSError):
        return any(os.path.realpath(entry) == str(file) for entry in Path(f"/proc/{process}/fd").iterdir())
    return False


@pytest.mark.slow
def test_a_part_that_kills_every_process_is_given_up_and_reported(model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    deadly = tmp_path / "in" / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 40), deadly)
    flags = ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job("score", "--model", model, "--input", deadly.parent, "--output", tmp_path / "out", *flags)
    while job.process.poll() is None:
        time.sleep(0.05)
        for process, title in descendants(job.process.pid).items():
            if WORKER in title and has_open(process, deadly):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    done = job.wait()
    assert done.code == 3, done.err
    assert (done.last_line["failed_files"], done.last_line["scored_rows"]) == (1, 0)
    assert "cannot be used: deadly.parquet: the process that scored it died 3 times" in done.err
