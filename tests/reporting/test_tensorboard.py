"""TensorBoard reads what is written: each epoch once, whatever was redone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnistsum_ray.reporting import pictures
from mnistsum_ray.reporting.report import scalars
from mnistsum_ray.reporting.tensorboard import FOLDER, write_end, write_epochs
from mnistsum_ray.storage.location import locate


def entry(epoch: int, loss: float = 0.5) -> dict[str, Any]:
    held_out = {"rows": 10, "pairs": 100, "loss": 0.25, "digit_accuracy": 0.9 + epoch / 100, "sum_accuracy": 0.8}
    return {
        "epoch": epoch,
        "train_loss": loss,
        "learning_rate": 0.01,
        "rows_per_second": 1000.0,
        "waiting": 0.01,
        "started": 1_700_000_000.0 + 60 * epoch,
        "seconds": 50.0,
        "evaluation_seconds": 5.0,
        "validation": held_out,
        "test": held_out,
    }


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def test_each_epoch_is_there_once_and_as_last_done(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "--storage-path")
    history = [entry(1), entry(2)]
    write_epochs(run, history[:1])
    write_epochs(run, history)
    history = [entry(1), entry(2, loss=0.4), entry(3)]  # a kill, and the second epoch again
    write_epochs(run, history[:2])
    (tmp_path / FOLDER / "events.out.tfevents.0000000001.epoch").unlink()  # a kill between saving and publishing
    write_epochs(run, history)
    events = read(tmp_path / FOLDER)
    for name in scalars(history[0]):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["epoch"], pytest.approx(scalars(line)[name])) for line in history], name
    assert [event.wall_time for event in events.Scalars("train/loss")] == [1_700_000_055.0 + 60 * epoch for epoch in (1, 2, 3)]


def test_the_models_scores_pictures_and_settings_are_shown(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "--storage-path")
    drawn = {"confusion.png": pictures.draw_confusion(np.eye(10, dtype=int).tolist())}
    write_epochs(run, [entry(5)])
    write_end(run, 5, entry(3), drawn, {"seed": 7})
    assert [path.suffix for path in sorted((tmp_path / FOLDER).iterdir())] == [".epoch", ".final"], "the order of reading"
    events = read(tmp_path / FOLDER)
    for name, accuracy in (("model/test/digit_accuracy", 0.93), ("test/digit_accuracy", 0.95)):
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(accuracy)]
    (image,) = events.Images("confusion.png")
    assert (image.step, image.width > 600) == (5, True)
    (text,) = events.Tensors("settings/text_summary")
    assert b"| seed | 7 |" in text.tensor_proto.string_val[0]
