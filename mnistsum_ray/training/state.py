"""What is kept of a run: a model folder for whoever uses the model, a trainer state to go on from.

Both are safetensors plus a small JSON that says everything about the tensors; nothing is ever unpickled.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mnistsum_ray.errors import one_line
from mnistsum_ray.model.evaluation import Metrics
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import Weights, copy_weights, save_model
from mnistsum_ray.storage.location import Location

STATE_FORMAT: Final = "mnistsum_ray/4"
"""Of a trainer's state: 4 has the checksums of the files beside it."""
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"


class CheckpointError(ValueError):
    """A trainer's state that cannot be gone on from; the message says why."""


@dataclass(frozen=True)
class EpochProgress:
    """How far an epoch is, and what has been counted in it over all workers: a part of an epoch is never counted twice."""

    steps: int = 0
    loss: float = 0.0
    """Added up over the rows."""
    rows: int = 0
    row_ids: int = 0
    """Added up likewise."""


@dataclass(frozen=True)
class SumHeadResult:
    """Result of fine-tuning the sum head after the last epoch (sum_head.py)."""

    steps: int
    kept: bool
    agreement: tuple[float, float]
    """Share of the validation pairs whose sum is the predicted digit plus the number, before and after."""
    validation: Metrics
    """After it, also where it was not kept."""
    test: Metrics
    """Likewise."""


@dataclass
class TrainerState:
    """Where a run stands after an epoch or within one; with the config it decides every bit of what follows."""

    epochs_done: int
    history: list[dict[str, Any]]
    best: Weights
    """Those of `best_line`; with the fine-tuned sum head, once there is one that was kept."""
    precision: str
    progress: EpochProgress = field(default_factory=EpochProgress)
    """Of the epoch after those."""
    sum_head: SumHeadResult | None = None
    """None before it, and where there is none."""

    @property
    def best_line(self) -> dict[str, Any]:
        """What history.jsonl says of the epoch that stands: the last that was as good as any (`metrics.as_good`)."""
        return max(self.history, key=lambda line: (line["best"], line["epoch"]))


def save_checkpoint(folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Write the trainer's state and, once an epoch is done, the best model so far into a local folder.

    `trainer.json` holds the SHA-256 of the other files, so that a checkpoint that was cut off is known for one.
    """
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, _, kept in optimizer.states():
        for key, value in kept.items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    (folder / STATE_FILE).write_bytes(save_tensors(tensors))
    if state.history:
        _save_best(folder, state)
    fields = {
        "format": STATE_FORMAT,
        "epochs_done": state.epochs_done,
        "progress": asdict(state.progress),
        "precision": state.precision,
        "history": state.history,
        "sum_head": None if state.sum_head is None else asdict(state.sum_head),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
    }
    (folder / STATE_CARD).write_text(json.dumps(fields) + "\n")


def _save_best(folder: Path, state: TrainerState) -> None:
    line, tuning = state.best_line, state.sum_head
    before, said = {of: line[of] for of in ("validation", "test")}, None
    scores = {of: Metrics(**values) for of, values in before.items()}
    if tuning:
        after = {"validation": tuning.validation, "test": tuning.test}
        said = {
            "steps": tuning.steps,
            "kept": tuning.kept,
            "before": {**before, "agreement": tuning.agreement[0]},
            "after": {**{of: asdict(values) for of, values in after.items()}, "agreement": tuning.agreement[1]},
        }
        scores = after if tuning.kept else scores
    save_model(folder, state.best, epoch=line["epoch"], **scores, sum_head=said)


class CheckpointVersionError(CheckpointError):
    """It was written by another version of this program."""


def verify_checkpoint(folder: Location) -> None:
    """Read a checkpoint folder and compare its files with their checksums.

    Raises:
        Unusable: a file is missing, was cut off, or is of another version.
        OSError: the storage does not answer.
    """
    try:
        fields = (folder / STATE_CARD).read_json()
        if fields["format"] != STATE_FORMAT:
            raise CheckpointVersionError(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")
        for name, expected in fields["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise CheckpointError(f"{name} is not whole (SHA-256 differs)")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"a file is missing ({one_line(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{STATE_CARD} is not whole ({one_line(error)})") from None


def load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    """Put weights and optimizer state back in place, on the device where the model already is.

    Raises:
        Unusable: the files are not whole, or of another version or network.
    """
    try:
        return _load_state(folder, model, optimizer)
    except (SafetensorError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(one_line(error)) from error


def _load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    fields = json.loads((folder / STATE_CARD).read_text())
    if fields["format"] != STATE_FORMAT:
        raise ValueError(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")
    groups: dict[str, Weights] = {}
    for name, value in load_tensors((folder / STATE_FILE).read_bytes()).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = value
    model.load_state_dict(groups["model"])
    states = {name: (like, kept) for name, like, kept in optimizer.states()}
    for name, value in groups["optimizer"].items():
        key, _, parameter_name = name.partition(".")
        like, kept = states[parameter_name]
        # The moments must lie in memory as their parameter does, which the file does not record.
        place = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value, device=like.device)
        kept[key] = place.detach().copy_(value)
    progress = EpochProgress(**fields["progress"])
    tuned = fields["sum_head"]
    scores = {of: Metrics(**tuned[of]) for of in ("validation", "test")} if tuned else {}
    sum_head = tuned and SumHeadResult(tuned["steps"], tuned["kept"], tuple(tuned["agreement"]), **scores)
    return TrainerState(fields["epochs_done"], fields["history"], groups["best"], fields["precision"], progress, sum_head)
