"""A model folder comes back as it was saved; what is no model, or a damaged one, is refused in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.serialization import Weights, copy_weights, describe_model, load_model, save_model
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.model import new_model

METRICS = {split: {"rows": 10, "sum_accuracy": 0.8} for split in ("validation", "test")}


def weights_of(seed: int) -> Weights:
    return copy_weights(new_model(seed))


def save(folder: Path, seed: int = 0, weights: Weights | None = None, **changed: Any) -> Location:
    weights = weights or weights_of(seed)
    save_model(writable(folder), weights, describe_model(weights, epoch=seed, metrics=METRICS) | changed)
    return locate(str(folder), "--model")


def test_a_model_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "run" / "model", 3)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, description = load_model(locate(str(folder), "--model"))
        weights = copy_weights(loaded)
        assert all(torch.equal(weights[name], value) for name, value in weights_of(3).items())
        assert not loaded.training
        assert (description["epoch"], description["parameters"], description["test"]["sum_accuracy"]) == (3, 220_125, 0.8)
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text()) == description


def test_a_reader_between_two_publications_finds_a_whole_model(tmp_path: Path) -> None:
    """As one that was killed between the two files leaves it: the description is in the file of the weights."""
    place = save(tmp_path, 11)
    other = json.loads((tmp_path / "model.json").read_text()) | {"sha256": "of other weights", "epoch": 12}
    (tmp_path / "model.json").write_text(json.dumps(other))
    assert load_model(place)[1]["epoch"] == 11


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epoch": None}, "its 'epoch' is None"),
        ({"sha256": ["a"]}, "its 'sha256' is ['a']"),
        ({"format": "else"}, "its format is not 'mnistsum_ray/5'"),
        ({"network": "Other"}, "its 'network' is Other, and here TwoHeadCNN; train again"),
        ({"input": {"number": "0..19"}}, "its 'number' is 0..19, and here 0..9"),
        (
            {"output": {"digit": "10 scores"}},
            "its 'output' is {'digit': '10 scores'}, and here {'digit': '10 scores', 'sum': '19",
        ),
        ({"weights": {"conv1.weight": torch.zeros(3)}}, "its tensors are not those of the network TwoHeadCNN"),
    ],
    ids=["epoch", "sha256", "format", "network", "numbers", "heads", "tensors"],
)
def test_a_model_without_what_scoring_needs_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        load_model(save(tmp_path, **changed))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        weights = weights_of(0)
        weights["conv3.weight"][5, 7, 1, 2] = value
        with pytest.raises(RequestError, match=r"conv3\.weight holds NaN or infinite weights"):
            load_model(save(tmp_path, weights=weights))


def without_end(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "holds no model"),
        (without_end, "is larger than any file of this program"),
        (lambda file: file.write_bytes(b"PK"), "model.safetensors cannot be used"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "model.safetensors cannot be used"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1"), "the SHA-256 of its weights differs"),
    ],
    ids=["missing", "without end", "two bytes", "cut short", "other bytes"],
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    place = save(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=rf"{tmp_path}.*{said}") as refused:
        load_model(place)
    assert "\n" not in str(refused.value)
