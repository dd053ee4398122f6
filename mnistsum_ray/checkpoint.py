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

from mnistsum_ray.calibration import Temperatures
from mnistsum_ray.errors import Refusal, one_line
from mnistsum_ray.metrics import Scores
from mnistsum_ray.model import PARAMETERS, PIXEL_MEAN, PIXEL_STD, TwoHeadCNN
from mnistsum_ray.optimizer import MuonAdamW
from mnistsum_ray.storage import Location

FORMAT: Final = "mnistsum_ray/2"
"""Of a model folder: 2 has the temperatures."""
STATE_FORMAT: Final = "mnistsum_ray/4"
"""Of a trainer's state: 4 has the checksums of the files beside it."""
MODEL_FILES: Final = ("model.safetensors", "model.json")
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"

Weights = dict[str, Tensor]


class Unusable(ValueError):
    """A trainer's state that cannot be gone on from; the message says why."""


def weights_of(model: TwoHeadCNN) -> Weights:
    """A copy of the weights on the CPU, float32, contiguous."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def save_model(
    folder: Path, weights: Weights, *, epoch: int, validation: Scores, test: Scores, sum_head: dict[str, Any] | None = None
) -> None:
    """Write `model.safetensors` and `model.json` into a local folder; `sum_head` is what the latter says of its fine-tuning."""
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
        "sum_head": sum_head,
        "temperature": Temperatures().as_json(),
        "validation": asdict(validation),
        "test": asdict(test),
    }
    (folder / MODEL_FILES[0]).write_bytes(data)
    (folder / MODEL_FILES[1]).write_text(json.dumps(card, indent=2) + "\n")


def load_model(folder: Location) -> tuple[TwoHeadCNN, dict[str, Any]]:
    """Load a model folder, or the `model` folder of a run: the network in evaluation mode and its card (model.json).

    Raises:
        Refusal: there is no model, it is not one of this network, its checksum is not the card's, or a weight is not finite.
    """
    try:
        if not (folder / MODEL_FILES[1]).exists():
            folder = folder / "model"
        card = (folder / MODEL_FILES[1]).read_json()
        data = (folder / MODEL_FILES[0]).read_bytes()
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder.text}: holds no model ({one_line(error)})") from None
    try:
        temperatures = _checked_card(card)
    except ValueError as error:
        raise Refusal(f"{folder.text}: model.json cannot be used: {error}") from None
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise Refusal(f"{folder.text}: model.safetensors is not the file that model.json describes (SHA-256 differs)")
    model = TwoHeadCNN()
    try:
        model.load_state_dict(load_tensors(data))
    except (SafetensorError, RuntimeError) as error:
        raise Refusal(f"{folder.text}: its tensors are not those of the network ({one_line(error)})") from None
    wrong = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if wrong:
        raise Refusal(f"{folder.text}: {wrong} holds NaN or infinite weights, so no answer would mean anything; train anew")
    model.temperatures = temperatures
    return model.eval(), card


def _checked_card(card: Any) -> Temperatures:
    """The temperatures of a card whose fields have the right kinds; those that a run adds may be missing.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"it does not say format {FORMAT!r}")
    for name, kind in (("sha256", str), ("epoch", int), ("parameters", int)):
        if not isinstance(card.get(name), kind):
            raise ValueError(f"its {name!r} is {str(card.get(name, 'missing'))[:80]}")
    return Temperatures.from_json(card.get("temperature"))


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
class SumHeadTuning:
    """Result of fine-tuning the sum head after the last epoch (sum_head.py)."""

    steps: int
    kept: bool
    agreement: tuple[float, float]
    """Share of the validation pairs whose sum is the predicted digit plus the number, before and after."""
    validation: Scores
    """After it, also where it was not kept."""
    test: Scores
    """Likewise."""


@dataclass
class TrainerState:
    """Where a run stands after an epoch or within one; with the config it decides every bit of what follows."""

    epochs_done: int
    history: list[dict[str, Any]]
    best: Weights
    """Those of `best_line`; with the fine-tuned sum head, once there is one that was kept."""
    precision: str
    progress: EpochSoFar = field(default_factory=EpochSoFar)
    """Of the epoch after those."""
    sum_head: SumHeadTuning | None = None
    """None before it, and where there is none."""

    @property
    def best_line(self) -> dict[str, Any]:
        """What history.jsonl says of the epoch that stands: the last that was as good as any (`metrics.as_good`)."""
        return max(self.history, key=lambda line: (line["best"], line["epoch"]))


def save_checkpoint(folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Write the trainer's state and, once an epoch is done, the best model so far into a local folder.

    `trainer.json` holds the SHA-256 of the other files, so that a checkpoint that was cut off is known for one.
    """
    tensors = {f"model.{name}": value for name, value in weights_of(model).items()}
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
    scores = {of: Scores(**values) for of, values in before.items()}
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


class OtherVersion(Unusable):
    """It was written by another version of this program."""


def check_whole(folder: Location) -> None:
    """Read a checkpoint folder and compare its files with their checksums.

    Raises:
        Unusable: a file is missing, was cut off, or is of another version.
        OSError: the storage does not answer.
    """
    try:
        fields = (folder / STATE_CARD).read_json()
        if fields["format"] != STATE_FORMAT:
            raise OtherVersion(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")
        for name, expected in fields["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise Unusable(f"{name} is not whole (SHA-256 differs)")
    except Unusable:
        raise
    except FileNotFoundError as error:
        raise Unusable(f"a file is missing ({one_line(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{STATE_CARD} is not whole ({one_line(error)})") from None


def load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    """Put weights and optimizer state back in place, on the device where the model already is.

    Raises:
        Unusable: the files are not whole, or of another version or network.
    """
    try:
        return _load_state(folder, model, optimizer)
    except (SafetensorError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise Unusable(one_line(error)) from error


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
    progress = EpochSoFar(**fields["progress"])
    tuned = fields["sum_head"]
    scores = {of: Scores(**tuned[of]) for of in ("validation", "test")} if tuned else {}
    sum_head = tuned and SumHeadTuning(tuned["steps"], tuned["kept"], tuple(tuned["agreement"]), **scores)
    return TrainerState(fields["epochs_done"], fields["history"], groups["best"], fields["precision"], progress, sum_head)
