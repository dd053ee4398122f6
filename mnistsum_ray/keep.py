"""What is left of a training run in its folder: manifest, model, history, pictures, report."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ray.train
from pyarrow.fs import FileSelector, FileType

from mnistsum_ray.checkpoint import MODEL_FILES, OtherVersion, Unusable, check_whole
from mnistsum_ray.errors import Refusal
from mnistsum_ray.loop import Outcome
from mnistsum_ray.prepare import Run
from mnistsum_ray.report import REPORT, report_page, versions, write_history
from mnistsum_ray.storage import Location


def manifest_of(run: Run, fingerprint: str, workers: str) -> dict[str, Any]:
    """What manifest.json says when a run begins: settings, versions, `workers` in words, and the data with their SHA-256."""
    source = run.source
    return {
        "status": "running",
        "config": run.config.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions(),
        "workers": workers,
        "data": {
            "source": source.name,
            "location": source.location,
            "notice": source.notice,
            "sha256": fingerprint,
            "train_rows": len(source.train),
            "validation_rows": len(source.validation),
            "test_rows": len(source.test),
        },
    }


_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints, which it writes in place: a kill in that moment leaves it cut short."""

_CHECKPOINT: Final = re.compile(r"epoch_(\d+)(?:_(step)_(\d+)|_(sum_head))?")


def last_whole_checkpoint(folder: Location, say: Callable[[str], None]) -> Location | None:
    """The newest whole checkpoint of a run; newer ones that are not are said, and that there is none.

    Raises:
        Refusal: it is of another version.
    """
    found: dict[tuple[int, int, int], str] = {}
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        match = _CHECKPOINT.fullmatch(info.base_name)
        if match and info.type == FileType.Directory:
            epoch = int(match[1])
            # One within an epoch is called after the epoch that it is in, and lies before that epoch's end.
            order = (epoch - 1, 1, int(match[3])) if match[2] else (epoch, 0, int(bool(match[4])))
            found[order] = info.base_name
    for order in sorted(found, reverse=True):
        place = folder / found[order]
        try:
            check_whole(place)
        except OtherVersion as error:
            raise Refusal(f"--resume: checkpoint {place.text} cannot be used: {error}; go on with that version") from None
        except Unusable as error:
            say(f"checkpoint {place.text} cannot be used: {error}")
            continue
        return place
    say(f"no checkpoint {'can be used' if found else 'is left'}, so the run begins anew")
    return None


def forget_other_checkpoints(folder: Location, start: Location | None) -> None:
    """Delete the run's checkpoints but the one that it goes on from, and Ray Train's list of them: it begins a new one."""
    (folder / _SNAPSHOT).delete()
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        if _CHECKPOINT.fullmatch(info.base_name) and (start is None or info.path != start.path):
            folder.filesystem.delete_dir(info.path)


FOUND_AT_THE_END: Final = ("temperature", "probabilities", "int8")
"""Fields of model.json that are not known before training has ended."""


def publish(
    folder: Location, checkpoint: ray.train.Checkpoint, history: list[dict[str, Any]], found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Put the best model so far, which every checkpoint carries, and the history into the run folder; the model's card.

    `found` is what the end of training adds to the card: temperatures, probability metrics, calibration for int8. What is there
    already of the same weights stays, so that a scoring run that began with it can go on.
    """
    from mnistsum_ray import tensorboard  # not needed before there is an epoch

    weights, card = MODEL_FILES
    with checkpoint.as_directory() as local:
        new: dict[str, Any] = json.loads((Path(local) / card).read_text())
        place = folder / "model" / card
        old = place.read_json() if place.exists() else {}
        same = old.get("sha256") == new["sha256"] and "probabilities" in old
        known = {key: old[key] for key in FOUND_AT_THE_END if same and key in old}
        (folder / "model" / weights).write_bytes((Path(local) / weights).read_bytes())
        new |= (found or {}) | known
        place.write_json(new)
    write_history(folder, history)
    tensorboard.write_epochs(folder, history)
    return new


def write_report(run: Run, manifest: dict[str, Any], card: dict[str, Any], outcome: Outcome) -> list[str]:
    """Pictures, report and TensorBoard's last file; the names of what a person may want to have elsewhere."""
    from mnistsum_ray import pictures, tensorboard  # a second to import, needed once

    found = outcome.examination
    drawn = {
        "history.png": pictures.draw_history(outcome.history),
        "confusion.png": pictures.draw_confusion(found.confusion),
        "sums.png": pictures.draw_sums(found.sums_right, found.confusion),
        "reliability.png": pictures.draw_reliability(found.reliability()),
        "mistakes.png": pictures.draw_mistakes(found.as_json()["mistakes"], outcome.mistaken),
    }
    for name, png in drawn.items():
        (run.folder / name).write_bytes(png)
    page = report_page(str(run.config.name), manifest, card, outcome.history, drawn)
    (run.folder / REPORT).write_bytes(page.encode())
    tensorboard.write_end(run.folder, outcome.history[-1]["epoch"], card, drawn, manifest["config"])
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in MODEL_FILES)]
