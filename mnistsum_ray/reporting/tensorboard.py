"""TensorBoard event files, one an epoch: `tensorboard --logdir runs`.

Usually one file is appended to, which object stores cannot do, and a run that goes on after a kill would tell some epochs twice.
A file an epoch is written whole, and replaced where the epoch is done again; TensorBoard reads all that lie in a folder.
"""

import io
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from mnistsum_ray.reporting.report import model_scalars, scalars
from mnistsum_ray.storage.location import Location

FOLDER: Final = "tensorboard"


def write_epochs(run: Location, history: list[dict[str, Any]]) -> None:
    """The event files of the lines of history.jsonl: the last in any case, the earlier where they are missing."""
    there = {info.path.rpartition("/")[2] for info in (run / FOLDER).files()}
    for entry in history:
        place = _place(run, entry["epoch"], "epoch")
        if entry is not history[-1] and place.path.rpartition("/")[2] in there:
            continue
        ended = entry["started"] + entry["seconds"] + entry["evaluation_seconds"]
        with tempfile.TemporaryDirectory() as name:
            with SummaryWriter(name) as writer:
                for key, value in scalars(entry).items():
                    writer.add_scalar(key, value, entry["epoch"], walltime=ended)
            place.write_bytes(_written(name))


def write_end(run: Location, epoch: int, card: dict[str, Any], pictures: dict[str, bytes], config: dict[str, Any]) -> None:
    """The event file of what there is at the end: what the model scored, pictures (PNG) by name, the settings as a table."""
    with tempfile.TemporaryDirectory() as name:
        with SummaryWriter(name) as writer:
            for key, value in model_scalars(card).items():
                writer.add_scalar(key, value, epoch)
            for key, png in pictures.items():
                with Image.open(io.BytesIO(png)) as picture:
                    writer.add_image(key, np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")
            lines = [f"| {key} | {value} |" for key, value in config.items()]
            writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), epoch)
        _place(run, epoch, "final").write_bytes(_written(name))


def _place(run: Location, epoch: int, what: str) -> Location:
    # TensorBoard, while it runs, only looks for names that come after those it has read.
    return run / FOLDER / f"events.out.tfevents.{epoch:010d}.{what}"


def _written(folder: str) -> bytes:
    (file,) = Path(folder).iterdir()
    return file.read_bytes()
