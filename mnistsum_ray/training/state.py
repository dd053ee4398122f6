"""Trainer state in a checkpoint folder: saved and loaded bit for bit, as safetensors and JSON, never as a pickle."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
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
from mnistsum_ray.model.serialization import Weights, copy_weights, describe_model
from mnistsum_ray.storage.location import Location

STATE_FORMAT: Final = "mnistsum_ray/8"
"""Format of `trainer.json`; since 8 ids of rows are scrambled before they are added up."""
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message says why."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint that another version of this program wrote."""


@dataclass(frozen=True)
class EpochProgress:
    """Progress within an epoch over all workers. A resumed epoch starts from it, so no row is counted twice."""

    steps: int = 0
    loss: float = 0.0
    """Sum over the rows, in nats."""
    rows: int = 0
    row_ids: int = 0
    """Sum of the scrambled ids of these rows, see `sampling.mix_ids`."""
    points: list[tuple[int, int, float]] = field(default_factory=list)
    """`steps`, `rows` and `loss` at some steps of the epoch, up to this one, for the curve of the loss."""

    def step_losses(self) -> list[tuple[int, float]]:
        """Pairs of a step and the mean loss a row, in nats, since the step of the pair before."""
        points = [(0, 0, 0.0), *self.points]
        return [(now[0], (now[2] - before[2]) / (now[1] - before[1])) for before, now in pairwise(points)]


@dataclass(frozen=True)
class SumHeadResult:
    """Result of fine-tuning the sum head after the last epoch."""

    steps: int
    kept: bool
    """False if the result was undone."""
    validation: Metrics
    """Metrics after fine-tuning, also where it was undone."""
    test: Metrics


@dataclass
class TrainerState:
    """State of a run after an epoch or within one; with the config it determines every bit of the rest of the run."""

    epochs_done: int
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    best: Weights
    """Weights of the epoch of `best_line`; with the fine-tuned sum head, where that was kept."""
    precision: str
    progress: EpochProgress = field(default_factory=EpochProgress)
    """Progress within the epoch after `epochs_done`."""
    sum_head: SumHeadResult | None = None
    """None before fine-tuning, and in runs without it."""

    @property
    def best_line(self) -> dict[str, Any]:
        """History line of the selected epoch: the last one that is within one standard error of the best before it."""
        return max(self.history, key=lambda line: (line["best"], line["epoch"]))

    def describe_best(self) -> dict[str, Any]:
        """Description of the selected model, see `serialization.describe_model`."""
        line, result = self.best_line, self.sum_head
        metrics = before = {split: line[split] for split in ("validation", "test")}
        sum_head = None
        if result is not None:
            after = {"validation": asdict(result.validation), "test": asdict(result.test)}
            sum_head = {"steps": result.steps, "kept": result.kept, "before": before, "after": after}
            metrics = after if result.kept else before
        return describe_model(self.best, epoch=line["epoch"], metrics=metrics, sum_head=sum_head)


def save_checkpoint(folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Write the state into a local folder.

    `trainer.json`, written last, holds the SHA-256 of the other files, so that an incomplete checkpoint is detected.
    """
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, _, moments in optimizer.states():
        for key, value in moments.items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    (folder / STATE_FILE).write_bytes(save_tensors(tensors))
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


def verify_checkpoint(folder: Location) -> None:
    """Compare the files of a checkpoint folder with their checksums.

    Raises:
        CheckpointError: a file is missing or incomplete.
        CheckpointVersionError: another version of this program wrote it.
        OSError: the storage does not answer.
    """
    try:
        fields = (folder / STATE_CARD).read_json()
        _check_format(fields)
        for name, expected in fields["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise CheckpointError(f"{name} is incomplete or damaged (SHA-256 differs)")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"a file is missing ({one_line(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{STATE_CARD} is incomplete or damaged ({one_line(error)})") from None


def load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    """Load a checkpoint into model and optimizer, in place, on the device of the model.

    Raises:
        CheckpointError: the files are incomplete, or of another version. Other errors, which another attempt may not meet, are
            raised as they are.
    """
    try:
        return _load_state(folder, model, optimizer)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(one_line(error)) from error


def _load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    fields = json.loads((folder / STATE_CARD).read_text())
    _check_format(fields)
    groups: dict[str, Weights] = {}
    for name, value in load_tensors((folder / STATE_FILE).read_bytes()).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = value
    model.load_state_dict(groups["model"])
    states = {name: (parameter, moments) for name, parameter, moments in optimizer.states()}
    for name, value in groups["optimizer"].items():
        key, _, parameter_name = name.partition(".")
        parameter, moments = states[parameter_name]
        if key not in moments:
            # A moment must have its parameter's memory format, which the file does not record.
            same_shape = value.shape == parameter.shape
            moments[key] = torch.empty_like(parameter if same_shape else value, device=parameter.device).detach()
        moments[key].copy_(value)
    result = fields["sum_head"]
    if result is not None:
        result = SumHeadResult(**result | {split: Metrics(**result[split]) for split in ("validation", "test")})
    progress = EpochProgress(**fields["progress"] | {"points": [tuple(point) for point in fields["progress"]["points"]]})
    return TrainerState(fields["epochs_done"], fields["history"], groups["best"], fields["precision"], progress, result)


def _check_format(fields: dict[str, Any]) -> None:
    if fields["format"] != STATE_FORMAT:
        raise CheckpointVersionError(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")
