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
from torch import Tensor

from mnistsum_ray.config import Refusal, one_line
from mnistsum_ray.metrics import Scores
from mnistsum_ray.model import PARAMETERS, PIXEL_MEAN, PIXEL_STD, TwoHeadCNN
from mnistsum_ray.optimizer import MuonAdamW
from mnistsum_ray.storage import Location

FORMAT: Final = "mnistsum_ray/1"
STATE_FORMAT: Final = "mnistsum_ray/3"
"""Of a trainer's state, which changes more often than what a model is: 2 has Muon's, 3 the lesson."""
MODEL_FILES: Final = ("model.safetensors", "model.json")

Weights = dict[str, Tensor]


class Unusable(ValueError):
    """A trainer's state that cannot be gone on from; the message says why."""


def weights_of(model: TwoHeadCNN) -> Weights:
    """A copy of the weights on the CPU, float32, contiguous."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def save_model(
    folder: Path, weights: Weights, *, epoch: int, validation: Scores, test: Scores, lesson: dict[str, Any] | None = None
) -> None:
    """Write `model.safetensors` and `model.json` into a local folder; `lesson` is what the latter says of it."""
    data = save_tensors(weights)
    card = {
        "format": FORMAT,
        "network": "TwoHeadCNN",
        "parameters": PARAMETERS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {
            "image": "28 x 28 grayscale, uint8, 0 background, 255 ink",
            "scaled": "(image / 255 - mean) / std",
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "number": "0..9",
        },
        "output": {"digit": "10 scores", "sum": "19 scores: digit + number is 0..18"},
        "epoch": epoch,
        "lesson": lesson,
        "validation": asdict(validation),
        "test": asdict(test),
    }
    (folder / MODEL_FILES[0]).write_bytes(data)
    (folder / MODEL_FILES[1]).write_text(json.dumps(card, indent=2) + "\n")


def load_model(folder: Location) -> tuple[TwoHeadCNN, dict[str, Any]]:
    """Load a model folder, or the `model` folder of a run: the network in evaluation mode and its card.

    Raises:
        Refusal: there is no model, or it is not one of this network, or its checksum is not the card's.
    """
    try:
        if not (folder / MODEL_FILES[1]).exists():
            folder = folder / "model"
        card = (folder / MODEL_FILES[1]).read_json()
        data = (folder / MODEL_FILES[0]).read_bytes()
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder.text}: holds no model ({one_line(error)})") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise Refusal(f"{folder.text}: model.json does not say format {FORMAT!r}")
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise Refusal(f"{folder.text}: model.safetensors is not the file that model.json describes (SHA-256 differs)")
    model = TwoHeadCNN()
    try:
        model.load_state_dict(load_tensors(data))
    except (SafetensorError, RuntimeError) as error:
        raise Refusal(f"{folder.text}: its tensors are not those of the network ({one_line(error)})") from None
    return model.eval(), card


@dataclass(frozen=True)
class EpochSoFar:
    """How far an epoch is, and what has been counted in it over all workers: a part of an epoch is never counted twice."""

    steps: int = 0
    loss: float = 0.0
    """Added up over the rows."""
    rows: int = 0
    row_ids: int = 0
    """Added up likewise."""


@dataclass(frozen=True)
class Lesson:
    """What the sum head's lesson after the last epoch came to, see lesson.py."""

    steps: int
    kept: bool
    agreement: tuple[float, float]
    """Share of the validation pairs whose sum is the number and the digit as it was answered, before it and after it."""
    validation: Scores
    """After it, as below, also where it was not kept."""
    test: Scores


@dataclass
class TrainerState:
    """Where a run stands after an epoch or within one; with the config it decides every bit of what follows."""

    epochs_done: int
    history: list[dict[str, Any]]
    best: Weights
    """Those of `best_line`, and after a lesson that was kept, of that."""
    precision: str
    progress: EpochSoFar = field(default_factory=EpochSoFar)
    """Of the epoch after those."""
    lesson: Lesson | None = None
    """None before it, and where there is none."""

    @property
    def best_line(self) -> dict[str, Any]:
        """What history.jsonl says of the epoch that stands: the last that was as good as any (`metrics.as_good`)."""
        return max(self.history, key=lambda line: (line["best"], line["epoch"]))


def save_state(folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Write `trainer.safetensors` and `trainer.json` into a local folder."""
    tensors = {f"model.{name}": value for name, value in weights_of(model).items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, _, kept in optimizer.states():
        for key, value in kept.items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    fields = {
        "format": STATE_FORMAT,
        "epochs_done": state.epochs_done,
        "progress": asdict(state.progress),
        "precision": state.precision,
        "history": state.history,
        "lesson": None if state.lesson is None else asdict(state.lesson),
    }
    (folder / "trainer.safetensors").write_bytes(save_tensors(tensors))
    (folder / "trainer.json").write_text(json.dumps(fields) + "\n")


def save_best(folder: Path, state: TrainerState) -> None:
    """Write the best model so far, with the lesson if it has had it, into a local folder."""
    line, lesson = state.best_line, state.lesson
    before, said = {of: line[of] for of in ("validation", "test")}, None
    scores = {of: Scores(**values) for of, values in before.items()}
    if lesson:
        after = {"validation": lesson.validation, "test": lesson.test}
        said = {
            "steps": lesson.steps,
            "kept": lesson.kept,
            "before": {**before, "agreement": lesson.agreement[0]},
            "after": {**{of: asdict(values) for of, values in after.items()}, "agreement": lesson.agreement[1]},
        }
        scores = after if lesson.kept else scores
    save_model(folder, state.best, epoch=line["epoch"], **scores, lesson=said)


def load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    """Put weights and optimizer state back in place, on the device where the model already is.

    Raises:
        Unusable: the files are not whole, or of another version or network.
    """
    try:
        return _load_state(folder, model, optimizer)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Unusable(one_line(error)) from error


def _load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    fields = json.loads((folder / "trainer.json").read_text())
    if fields["format"] != STATE_FORMAT:
        raise ValueError(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")
    groups: dict[str, Weights] = {}
    for name, value in load_tensors((folder / "trainer.safetensors").read_bytes()).items():
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
    progress = EpochSoFar(**fields["progress"])
    taught = fields["lesson"]
    scores = {of: Scores(**taught[of]) for of in ("validation", "test")} if taught else {}
    lesson = taught and Lesson(taught["steps"], taught["kept"], tuple(taught["agreement"]), **scores)
    return TrainerState(fields["epochs_done"], fields["history"], groups["best"], fields["precision"], progress, lesson)
