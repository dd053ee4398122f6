"""What a run finds when it goes on: damaged checkpoints, other data, a lock that is another's."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import RequestError
from mnistsum_ray.predicting import predict
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE
from tests.integration.conftest import Bomb, Job, Trained, once, train_here, write_shuffled_sample

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

STREAMED: dict[str, Any] = {"recipe": "long", "batch_size": 32, "sum_head_steps": 20, "shuffle_rows": 1000, "name": "mine"}


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
def whole(cluster: str, tmp_path_factory: pytest.TempPathFactory, data: Path, killed: Path) -> Trained:
    """The same run to its end, without the bad rows."""
    runs = tmp_path_factory.mktemp("whole")

    def copy() -> None:
        shutil.copytree(runs, killed, ignore=shutil.ignore_patterns(".*", "_lock"))

    with once((runs / "mine" / "epoch_00002" / STATE_CARD).exists, copy):
        whole = train_here(data=data, storage_path=runs, skip_bad_rows=True, epochs=3, **STREAMED)
    assert not (killed / "mine" / "epoch_00003").exists(), "copied too late"
    return whole


def test_rows_that_are_left_out_are_counted_in_manifest_and_report(whole: Trained) -> None:
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    assert f"left out: 100 of 1,600 rows: 2.parquet: row 0: {reason} | 2.parquet: row 4: " in whole.said
    assert re.search(r"streaming 1,\d{3} training rows, shuffled in windows of 992; holds at most \d MiB", whole.said)
    assert whole.said.count(": loss ") == 3
    assert sum(whole.line["data"][f"{split}_rows"] for split in ("train", "validation", "test")) == 1500
    run = Path(whole.line["run"])
    manifest = json.loads((run / "manifest.json").read_text())
    places = [["2.parquet", row] for row in range(0, 20, 4)]
    assert manifest["data"]["bad_rows"] == {"rows": 100, "reasons": {reason: 100}, "examples": {reason: places}}
    assert f"<td>100</td><td>{reason}</td><td>2.parquet, row 0; " in (run / "report.html").read_text()


def test_a_model_of_dark_ink_on_white_gets_pictures_so(whole: Trained, data: Path) -> None:
    run = whole.line["run"]
    assert json.loads((Path(run) / "model" / "model.json").read_text())["input"]["background"] == 255
    dark = np.frombuffer(pq.read_table(data / "0.parquet")["image"][0].as_py(), np.uint8).reshape(28, 28)
    for picture in (dark, 255 - dark):
        assert background_of(predict(run, Image.fromarray(picture), 3).pixels) == 255


def test_a_damaged_checkpoint_is_passed_over_and_data_that_changed_are_refused(
    tmp_path: Path, data: Path, whole: Trained, killed: Path, bomb: Bomb
) -> None:
    """The run goes on from a copy of the files. The damaged checkpoint holds a pickle, which is not executed."""
    copy, runs = Path(shutil.copytree(data, tmp_path / "copy")), Path(shutil.copytree(killed, tmp_path / "runs"))
    last = max((runs / "mine").glob("epoch_*"))
    (last / STATE_FILE).write_bytes(bomb.pickled)
    card = json.loads((last / STATE_CARD).read_text())
    (last / STATE_CARD).write_text(json.dumps(card | {"sha256": hashlib.sha256(bomb.pickled).hexdigest()}))
    os.truncate(runs / "mine" / "checkpoint_manager_snapshot.json", 50)
    finished = train_here(storage_path=runs, name="mine", resume=True, data=copy)
    assert f"checkpoint {last} cannot be used: trainer.safetensors is incomplete or damaged" in finished.said
    assert "going on after epoch 1, on 1 worker" in finished.said
    assert not bomb.mark.exists(), "the pickle was executed"
    assert finished.weights() == whole.weights()
    assert json.loads((runs / "mine" / "manifest.json").read_text())["status"] == "finished"
    pq.write_table(pq.read_table(copy / "0.parquet").slice(1), copy / "0.parquet")
    with pytest.raises(RequestError, match=rf"^--resume: the data are not those of the run .* from {copy}\); name the same"):
        train_here(storage_path=runs, name="mine", resume=True, data=copy)


@pytest.mark.usefixtures("whole")
def test_a_run_that_starts_again_and_loses_its_lock_ends_at_once_also_where_sigint_is_ignored(
    cluster: str, killed: Path, tmp_path: Path
) -> None:
    """It finds no whole checkpoint. A shell starts `command &` in a script with SIGINT ignored."""
    runs = Path(shutil.copytree(killed, tmp_path / "runs"))
    for path in (runs / "mine").glob(f"epoch_*/{STATE_CARD}"):
        path.write_text("{")
    flags = ["--storage-path", runs, "--name", "mine", "--resume"]
    job = Job("train", *flags, address=cluster, before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    job.wait_for_line("no checkpoint can be used, so the run starts from the beginning")
    job.wait_for_line("epoch 1: loss ")
    (runs / "mine" / "_lock").unlink()
    (runs / "mine" / "_lock").write_text('{"id": "another run"}')
    done = job.wait()
    assert done.code == 1
    assert "another run has taken the output (another run)" in done.error
    assert "going on after epoch" not in done.err, "another attempt would fail in the same way"
    assert "Traceback" not in done.err
