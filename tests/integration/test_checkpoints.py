"""What a run finds when it goes on: damaged checkpoints, other data, a lock that is another's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.predicting import predict
from mnistsum_ray.training.checkpoint import STATE_DIGEST, STATE_FILE
from tests.integration.conftest import (
    TRAIN,
    Bomb,
    Trained,
    history_of,
    kill_worker,
    once,
    train_here,
    write_shuffled_sample,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

# All that a run draws: numbers, order, distortions, dropout.
SETTINGS: dict[str, Any] = {
    "recipe": "long",
    "batch_size": 32,
    "sum_head_steps": 20,
    "num_workers": 2,
    "name": "mine",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of dark ink on white. In the third, every fourth digit is 11."""
    folder = write_shuffled_sample(tmp_path_factory.mktemp("data") / "rows", rows=1600)
    for path in folder.iterdir():
        table = pq.read_table(path)
        digits = table["digit"].to_numpy().copy()
        if path.name == "2.parquet":
            digits[::4] = 11
        dark = [image.tobytes() for image in 255 - pixels_view(one_chunk(table["image"]))]
        pq.write_table(pa.table({"image": dark, "digit": digits}), path, row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder that is left where the driver of the run `mine` is killed in its third epoch."""
    return tmp_path_factory.mktemp("killed") / "runs"


@pytest.fixture(scope="module")
def whole(
    cluster: str, tmp_path_factory: pytest.TempPathFactory, data: Path, killed: Path
) -> Trained:
    """The same run to its end, on two workers, without the bad rows."""
    runs = tmp_path_factory.mktemp("whole")

    def copy() -> None:
        shutil.copytree(runs, killed, ignore=shutil.ignore_patterns(".*", "_lock"))

    with once(lambda: len(digests(runs)) == 2, copy):
        whole = train_here(data=data, storage_path=runs, skip_bad_rows=True, epochs=3, **SETTINGS)
    assert [path.parent.name for path in digests(killed)] == ["epoch_00001", "epoch_00002"], (
        "copied too late"
    )
    return whole


def digests(runs: Path) -> list[Path]:
    """The last file of each checkpoint of the run, in the order of attempts and epochs."""
    return sorted((runs / "mine" / "checkpoints").glob(f"*/epoch_*/{STATE_DIGEST}"))


def test_rows_that_are_left_out_are_counted_in_manifest_and_report(whole: Trained) -> None:
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    assert (
        f"left out: 100 of 1,600 rows: 2.parquet: row 0: {reason} | 2.parquet: row 4: "
        in whole.said
    )
    assert whole.said.count(": loss ") == 3
    assert (
        sum(whole.line["data"][f"{split}_rows"] for split in ("train", "validation", "test"))
        == 1500
    )
    run = Path(whole.line["run"])
    manifest = json.loads((run / "manifest.json").read_text())
    places = [["2.parquet", row, reason] for row in range(0, 20, 4)]
    assert manifest["data"]["bad_rows"] == {
        "rows": 100,
        "reasons": {reason: 100},
        "examples": places,
    }
    assert (
        f"<td>100</td><td>{reason}</td><td>2.parquet, row 0; " in (run / "report.html").read_text()
    )


def test_a_model_of_dark_ink_on_white_gets_pictures_so(whole: Trained, data: Path) -> None:
    run = whole.line["run"]
    assert (
        json.loads((Path(run) / "model" / "model.json").read_text())["input"]["background"] == 255
    )
    dark = np.frombuffer(pq.read_table(data / "0.parquet")["image"][0].as_py(), np.uint8).reshape(
        28, 28
    )
    for picture in (dark, 255 - dark):
        assert background_of(predict(run, Image.fromarray(picture), 3).pixels) == 255


def test_a_damaged_checkpoint_is_passed_over_and_a_killed_worker_costs_an_epoch_and_no_bit(
    tmp_path: Path, data: Path, whole: Trained, killed: Path, bomb: Bomb
) -> None:
    """The run goes on with a copy of the data. What is damaged: a checkpoint, by a pickle, and Ray's own list."""
    copy, runs = (
        Path(shutil.copytree(data, tmp_path / "copy")),
        Path(shutil.copytree(killed, tmp_path / "runs")),
    )
    last = digests(runs)[-1].parent
    (last / STATE_FILE).write_bytes(bomb.pickled)
    os.truncate(last.parent / "checkpoint_manager_snapshot.json", 50)
    with once(lambda: len(digests(runs)) == 3, lambda: kill_worker(os.getpid(), TRAIN)):
        finished = train_here(storage_path=runs, name="mine", resume=True, data=copy)
    assert (
        f"checkpoint {last} cannot be used: trainer.safetensors is incomplete or damaged"
        in finished.said
    )
    assert "going on after epoch 1, on 2 workers" in finished.said
    assert finished.said.count("going on after epoch ") == 2, "the worker was killed"
    assert not bomb.mark.exists(), "the pickle was executed"
    assert finished.weights() == whole.weights()
    assert json.loads((runs / "mine" / "manifest.json").read_text())["status"] == "finished"
    pq.write_table(pq.read_table(copy / "0.parquet").slice(1), copy / "0.parquet")
    with pytest.raises(
        RequestError,
        match=rf"^--resume: the data are not those of the run .* from {copy}\); name the same",
    ):
        train_here(storage_path=runs, name="mine", resume=True, data=copy)


@pytest.mark.usefixtures("whole")
def test_a_run_without_a_whole_checkpoint_begins_again_and_publishes_nothing_without_its_lock(
    killed: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(killed, tmp_path / "runs"))
    for path in digests(runs):
        path.write_text("")

    def take_lock() -> None:
        (runs / "mine" / "_lock").unlink()
        (runs / "mine" / "_lock").write_text("another-run")

    taken = r"another run has taken the output \(another-run\)"
    with once(lambda: len(digests(runs)) == 3, take_lock), pytest.raises(RunError, match=taken):
        train_here(storage_path=runs, name="mine", resume=True)
    firsts = [history_of(folder / "mine")[0]["started"] for folder in (killed, runs)]
    assert firsts[0] < firsts[1], "the first epoch was trained again"
    assert not (runs / "mine" / "model").exists()
