"""Faults around a job: the storage is overloaded, the disk is full, the head is killed. What is scored is kept."""

import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.api import fit
from mnistsum_ray.config import ExportPairsConfig, TrainConfig
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.checkpoint import STATE_FILE
from tests.integration.conftest import (
    Job,
    Scored,
    Storage,
    history_of,
    mounted,
    nodes,
    once,
    score_here,
    train_here,
    wait_for_files,
)

pytestmark = pytest.mark.slow

EVERY = 5
OVERLOADED_SECONDS = 10
BUSY_SECONDS = 3
"""Ray Train stores checkpoints by Arrow, which gives up after 6 s."""


def pairs(folder: Path | str, rows: int) -> list[object]:
    """Write input files with this many rows; return the flags that score them."""
    export_pairs(ExportPairsConfig(data="sample", output=f"{folder}/in", rows=rows, files=4), print)
    return ["--input", f"{folder}/in", "--output", f"{folder}/out", "--max-rows-per-file", 250]


def score_pairs(model: Path, folder: Path | str, output: Path | str | None = None) -> Scored:
    """Score the files of `pairs` in this process, with the settings of the command."""
    return score_here(
        model,
        output or f"{folder}/out",
        f"{folder}/in",
        max_rows_per_file=250,
        precision=None,
        num_workers=None,
    )


@pytest.mark.usefixtures("cluster")
def test_scoring_outlasts_a_storage_that_is_overloaded(s3: Storage, model: Path) -> None:
    pairs("s3://scores/busy", 6_000)
    output, refused = locate("s3://scores/busy/out/predictions", "--output"), s3.refused
    with once(output.files, lambda: s3.overload(OVERLOADED_SECONDS)):
        done = score_pairs(model, "s3://scores/busy")
    assert s3.refused > refused
    assert done.line["input_rows"] == done.line["scored_rows"] == 6_000


def test_a_file_that_the_storage_does_not_give_is_not_called_bad(
    s3: Storage, cluster: str, model: Path, tmp_path: Path
) -> None:
    """The storage refuses it when files before it are scored, or the input folder is moved away: the
    run ends, and nothing is deleted."""
    rows, end = 10_000, "part-00003.parquet"
    roots = {
        "refused": locate("s3://scores/refused", "--output"),
        "moved": locate(str(tmp_path), "--output"),
    }
    flags = {
        way: ["--model", model, *pairs(place.display, rows), "--num-workers", 1]
        for way, place in roots.items()
    }
    try:
        jobs = {way: Job("score", *of_job, address=cluster) for way, of_job in flags.items()}
        wait_for_files(jobs["moved"], tmp_path / "out", 4)
        (tmp_path / "in").rename(tmp_path / "away")
        wait_for_files(jobs["refused"], roots["refused"] / "out", 2)
        s3.statuses[f"refused/in/{end}"] = "403 Forbidden"
        done = {way: job.wait() for way, job in jobs.items()}
    finally:
        s3.statuses.clear()
    (tmp_path / "away").rename(tmp_path / "in")
    said = {
        "refused": f"refused/in/{end}: cannot be read",
        "moved": "is not there, or not on this node",
    }
    for way, ended in done.items():
        assert ended.code == 1, ended.err
        assert said[way] in ended.error
        assert ended.error.endswith("what is scored is kept, and the same command goes on")
        output = roots[way] / "out/predictions"
        before = {file for file in output.files() if file.name.endswith(".parquet")}
        again = score_pairs(model, roots[way].display)
        assert again.line["scored_rows"] == rows
        assert again.line["resumed_rows"] >= 250 * len(before) >= 500
        assert before <= {*output.files()}, "written again"


@pytest.mark.usefixtures("cluster")
def test_training_outlasts_a_storage_that_is_slow_refuses_the_history_and_is_overloaded(
    s3: Storage, data: Path
) -> None:
    """Epochs do not wait for checkpoints that take 2 s each to write (the S3 client gives up after 3)."""
    locate("s3://images/rows.parquet", "--data").write(data.read_bytes())
    place = {"data": "s3://images/rows.parquet", "storage_path": "s3://runs/slow", "name": "mine"}
    run, refused = locate("s3://runs/slow/mine", "--storage-path"), s3.refused

    s3.write_seconds, s3.statuses["/history.jsonl"] = 2.0, "403 Forbidden"
    try:
        with (
            once(lambda: s3.refused > refused, s3.statuses.clear),
            once(
                lambda: not s3.statuses and len(history_of(run)) >= 3,
                lambda: s3.overload(BUSY_SECONDS),
            ),
        ):
            done = train_here(**place, epochs=6, sum_head_steps=50)
    finally:
        s3.write_seconds = 0.0
        s3.statuses.clear()
    assert "history.jsonl: " in done.said
    epochs = history_of(run)
    assert [line["epoch"] for line in epochs] == list(range(1, 7)), (
        "written when the storage allows it"
    )
    ends = [line["started"] + line["seconds"] + line["evaluation_seconds"] for line in epochs]
    gaps = [after["started"] - end for end, after in zip(ends, epochs[1:], strict=False)]
    assert statistics.median(gaps) < 1.5, gaps
    saved = {Path(info.path).parent.name for info in run.files() if info.name == STATE_FILE}
    assert saved >= {"epoch_00005", "epoch_00006"}, (
        "Ray Train keeps the last two, and what it could not delete"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "2m") as may:
        if not may:
            pytest.skip("needs the right to mount a file system")
        yield folder


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)


@pytest.mark.usefixtures("cluster")
def test_scoring_onto_a_disk_that_is_full(small_disk: Path, model: Path, tmp_path: Path) -> None:
    output = small_disk / "out"
    pairs(tmp_path, 5_000)
    (small_disk / "other").write_bytes(bytes(2 * 2**20 - 80_000))
    with pytest.raises(
        RunError,
        match=rf"--output {output}/predictions/.*: cannot be written: .*No space left on device",
    ):
        score_pairs(model, tmp_path, output)
    assert not (output / "manifest.json").exists()
    enlarge(small_disk)
    done = score_pairs(model, tmp_path, output)
    assert done.line["scored_rows"] == 5_000
    assert done.line["resumed_rows"] > 0


@pytest.mark.usefixtures("cluster")
def test_training_onto_a_disk_that_is_full(
    small_disk: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: dict[str, Any] = {"storage_path": str(small_disk), "name": "mine"}
    with pytest.raises(RunError, match="--name mine --resume") as error:
        fit(TrainConfig(data=str(data), epochs=1, sum_head_steps=50, max_failures=0, **place))
    assert "No space left on device" in capsys.readouterr().err + str(error.value)
    enlarge(small_disk)
    assert train_here(resume=True, **place).line["test"]["rows"]


def test_a_head_that_is_killed_ends_the_job_and_costs_nothing_that_is_scored(
    cluster: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "RAY_gcs_rpc_server_reconnect_timeout_s", "5"
    )  # Ray's default of 60 s would only make the test longer
    rows = 10_000
    flags = ["--model", model, *pairs(tmp_path, rows)]
    with nodes(1, 1) as killed_cluster:
        job = Job("score", *flags, address=killed_cluster.address)
        wait_for_files(job, tmp_path / "out", 4)
        killed_cluster.remove_node(killed_cluster.head_node, allow_graceful=False)
        done = job.wait()
        assert done.code == 1, done.err
    again = score_pairs(model, tmp_path)
    assert again.line["scored_rows"] == rows
    assert again.line["resumed_rows"] > 0
