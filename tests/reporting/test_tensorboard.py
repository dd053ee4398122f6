"""TensorBoard reads the event files: each epoch once, also after epochs were repeated."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnistsum_ray.reporting.report import epoch_scalars
from mnistsum_ray.reporting.tensorboard import FOLDER, write_epochs
from mnistsum_ray.storage.uri import locate


def entry(epoch: int, loss: float = 0.5) -> dict[str, Any]:
    held_out = {"rows": 10, "pairs": 100, "loss": 0.25}
    held_out |= {"digit_accuracy": 0.9 + epoch / 100, "sum_accuracy": 0.8}
    return {
        "epoch": epoch,
        "train_loss": loss,
        "step_losses": [[16, loss + 0.1], [25, loss - 0.1]],
        "learning_rate": 0.01,
        "rows_per_second": 1000.0,
        "waiting": 0.01,
        "started": 1_700_000_000.0 + 60 * epoch,
        "seconds": 50.0,
        "evaluation_seconds": 5.0,
        "validation": held_out,
        "test": held_out,
    }


def test_each_epoch_is_shown_once_as_it_was_last_trained(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "--name")
    history = [entry(1), entry(2)]
    write_epochs(run, history[:1])
    write_epochs(run, history)
    history = [entry(1), entry(2, loss=0.4), entry(3)]  # a kill, then the second epoch is repeated
    write_epochs(run, history[:2])
    (
        tmp_path / FOLDER / "events.out.tfevents.0000000001.epoch"
    ).unlink()  # a kill between saving and publishing
    write_epochs(run, history)
    events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    for name in epoch_scalars(history[0]):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [
            (line["epoch"], pytest.approx(epoch_scalars(line)[name])) for line in history
        ], name
    within = [(event.step, round(event.value, 3)) for event in events.Scalars("train/step_loss")]
    assert within == [(16, 0.6), (25, 0.4), (41, 0.5), (50, 0.3), (66, 0.6), (75, 0.4)]
