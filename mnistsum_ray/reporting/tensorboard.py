"""TensorBoard event files, one per epoch (`tensorboard --logdir runs`).

Object stores cannot append to one file, and a run resumed after a kill would log some epochs twice.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter

from mnistsum_ray.reporting.report import epoch_end, epoch_scalars, scores
from mnistsum_ray.storage.store import Location

FOLDER: Final = "tensorboard"


def _name(epoch: int, kind: str) -> str:
    # TensorBoard wants new files to sort after those that it has read: zeros, "epoch" < "final".
    return f"{FOLDER}/events.out.tfevents.{epoch:010d}.{kind}"


@contextmanager
def _event_file(run: Location, name: str) -> Iterator[SummaryWriter]:
    """A writer whose events become one file at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            yield writer
        (written,) = Path(folder).iterdir()
        (run / name).write(written.read_bytes())


def write_epochs(run: Location, history: list[dict[str, Any]]) -> None:
    """Write the event file of the last epoch, and those of earlier ones that are missing."""
    existing = {file.path for file in (run / FOLDER).files()}
    for entry in history:
        name = _name(entry["epoch"], "epoch")
        if entry is not history[-1] and (run / name).path in existing:
            continue
        with _event_file(run, name) as writer:
            for key, value in epoch_scalars(entry).items():
                writer.add_scalar(key, value, entry["epoch"], walltime=epoch_end(entry))
            steps = entry["step_losses"][-1][0]
            for step, loss in entry["step_losses"]:
                in_run = (entry["epoch"] - 1) * steps + step
                trained = entry["started"] + entry["seconds"] * step / steps
                writer.add_scalar("train/step_loss", loss, in_run, walltime=trained)


def write_final(run: Location, epoch: int, description: dict[str, Any]) -> None:
    """Write the event file of the finished run: the model's metrics, shown under the last epoch."""
    with _event_file(run, _name(epoch, "final")) as writer:
        for key, value in scores(description, "final").items():
            writer.add_scalar(key, value, epoch)
