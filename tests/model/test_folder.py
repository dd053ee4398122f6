"""A model folder comes back as it was saved; what is no model, or a damaged one, is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mnistsum_ray
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.folder import (
    Weights,
    checksum,
    copy_weights,
    describe_model,
    load_model,
    write_model,
)
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.model import new_model

METRICS = {split: {"rows": 10, "sum_accuracy": 0.8} for split in ("validation", "test")}


def save(folder: Path, seed: int = 0, weights: Weights | None = None, **changed: Any) -> Location:
    weights = weights or copy_weights(new_model(seed))
    place = locate(str(folder), "--model")
    write_model(place, weights, describe_model(weights, epoch=seed, metrics=METRICS) | changed)
    return place


def test_a_model_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "run" / "model", 3)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, description = load_model(locate(str(folder), "--model"))
        assert checksum(copy_weights(loaded)) == checksum(copy_weights(new_model(3)))
        assert not loaded.training
        assert (description["epoch"], description["parameters"]) == (3, 220_125)
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text()) == description


def test_a_network_of_ones_own_is_saved_where_nothing_lies(tmp_path: Path) -> None:
    network = new_model(3)
    network.background = 255
    mnistsum_ray.save_model(network, tmp_path)
    loaded = mnistsum_ray.load_model(tmp_path)
    assert checksum(copy_weights(loaded)) == checksum(copy_weights(network))
    assert loaded.background == 255
    with pytest.raises(RequestError, match="is not empty"):
        mnistsum_ray.save_model(network, tmp_path)


def test_a_reader_between_two_publications_finds_a_whole_model(tmp_path: Path) -> None:
    """A kill between the two files leaves it so: the description is in the file of the weights."""
    place = save(tmp_path, 11)
    other = json.loads((tmp_path / "model.json").read_text()) | {"sha256": "other", "epoch": 12}
    (tmp_path / "model.json").write_text(json.dumps(other))
    assert load_model(place)[1]["epoch"] == 11


def described(**changed: Any) -> Callable[[Path], object]:
    return lambda folder: save(folder, **changed)


def weighted(change: Callable[[Weights], object]) -> Callable[[Path], object]:
    """Save a model whose weights were changed."""

    def write(folder: Path) -> None:
        weights = copy_weights(new_model())
        change(weights)
        save(folder, weights=weights)

    return write


def filed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the bytes of the file of the weights."""

    def write(folder: Path) -> None:
        save(folder)
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return write


DEEP = (100_000).to_bytes(8, "little") + b"[" * 100_000
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "checksum": (described(sha256="another"), "is damaged (the SHA-256 of its weights differs)"),
    "version": (described(format="else"), "its format is not 'mnistsum_ray/5'"),
    "network": (described(network="Other"), "its 'network' is Other, and here TwoHeadCNN"),
    "number": (described(input={"number": "0..19"}), "its 'number' is 0..19, and here 0..9"),
    "fewer tensors": (weighted(lambda weights: weights.pop("fc2.bias")), "TwoHeadCNN"),
    "more tensors": (weighted(lambda weights: weights.update(x=torch.zeros(3))), "TwoHeadCNN"),
    "no file": (lambda folder: (save(folder) / "model.safetensors").delete(), "holds no model"),
    "cut short": (filed(lambda data: data[:-100]), "cannot be used"),
    "other bytes": (filed(lambda data: data[:-4] + b"\0\0\0\1"), "is damaged"),
    "deep": (filed(lambda _: DEEP), "cannot be used"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_model_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    write, said = REFUSED[case]
    write(tmp_path)
    with pytest.raises(RequestError, match=re.escape(said)) as error:
        load_model(locate(str(tmp_path), "--model"))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
