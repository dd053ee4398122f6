"""TensorBoard event files, one per epoch (`tensorboard --logdir runs`).

The usual single file grows by appending. Object stores cannot append, and a run resumed after a kill would log some epochs twice.
A file per epoch is written whole, and replaced when the epoch is repeated. TensorBoard reads all event files of a folder.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter

from mnistsum_ray.reporting.report import epoch_end, epoch_scalars, model_scalars
from mnistsum_ray.storage.folder import OutputFolder

FOLDER: Final = "tensorboard"


def _name(epoch: int, kind: str) -> str:
    # A running TensorBoard picks up only files whose names sort after those that it has read: hence zeros, and "epoch" < "final".
    return f"{FOLDER}/events.out.tfevents.{epoch:010d}.{kind}"


@contextmanager
def _event_file(run: OutputFolder, name: str) -> Iterator[SummaryWriter]:
    """A writer whose events become one file at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            yield writer
        (written,) = Path(folder).iterdir()
        run.write(name, written.read_bytes())


def write_epochs(run: OutputFolder, history: list[dict[str, Any]]) -> None:
    """Write the event file of the last line of history.jsonl, and those of earlier epochs that are missing."""
    existing = {file.path for file in (run.place / FOLDER).files()}
    for entry in history:
        name = _name(entry["epoch"], "epoch")
        if entry is not history[-1] and (run.place / name).path in existing:
            continue
        with _event_file(run, name) as writer:
            for key, value in epoch_scalars(entry).items():
                writer.add_scalar(key, value, entry["epoch"], walltime=epoch_end(entry))
            steps = entry["step_losses"][-1][0]
            for step, loss in entry["step_losses"]:
                trained = entry["started"] + entry["seconds"] * step / steps
                writer.add_scalar("train/step_loss", loss, (entry["epoch"] - 1) * steps + step, walltime=trained)


def write_final(run: OutputFolder, epoch: int, card: dict[str, Any]) -> None:
    """Write the event file of the finished run: the model's metrics, shown under the last epoch."""
    with _event_file(run, _name(epoch, "final")) as writer:
        for key, value in model_scalars(card).items():
            writer.add_scalar(key, value, epoch)
