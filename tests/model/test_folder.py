"""A model folder comes back as it was saved; what is no model, or a damaged one, is refused in one line."""

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


def weights_of(seed: int) -> Weights:
    return copy_weights(new_model(seed))


def save(folder: Path, seed: int = 0, weights: Weights | None = None, **changed: Any) -> Location:
    weights = weights or weights_of(seed)
    place = locate(str(folder), "--model")
    write_model(place, weights, describe_model(weights, epoch=seed, metrics=METRICS) | changed)
    return place


def test_a_model_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "run" / "model", 3)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, description = load_model(locate(str(folder), "--model"))
        assert checksum(copy_weights(loaded)) == checksum(weights_of(3))
        assert not loaded.training
        assert (
            description["epoch"],
            description["parameters"],
            description["test"]["sum_accuracy"],
        ) == (3, 220_125, 0.8)
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text()) == description


def test_a_network_of_ones_own_is_saved_where_nothing_lies(tmp_path: Path) -> None:
    network = new_model(3)
    network.background = 255
    mnistsum_ray.save_model(network, tmp_path)
    loaded = mnistsum_ray.load_model(tmp_path)
    assert checksum(copy_weights(loaded)) == checksum(weights_of(3))
    assert loaded.background == 255
    with pytest.raises(RequestError, match="is not empty"):
        mnistsum_ray.save_model(network, tmp_path)


def test_a_reader_between_two_publications_finds_a_whole_model(tmp_path: Path) -> None:
    """As one that was killed between the two files leaves it: the description is in the file of the weights."""
    place = save(tmp_path, 11)
    other = json.loads((tmp_path / "model.json").read_text()) | {
        "sha256": "of other weights",
        "epoch": 12,
    }
    (tmp_path / "model.json").write_text(json.dumps(other))
    assert load_model(place)[1]["epoch"] == 11


def refused(place: Location, said: str) -> None:
    """Loading it is one line that names the folder."""
    with pytest.raises(RequestError, match=re.escape(said)) as error:
        load_model(place)
    assert str(error.value).startswith(place.display)
    assert "\n" not in str(error.value)


DESCRIPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "another"}, "is damaged (the SHA-256 of its weights differs)"),
    ({"format": "else"}, "its format is not 'mnistsum_ray/5'"),
    ({"network": "Other"}, "its 'network' is Other, and here TwoHeadCNN; train again"),
    ({"input": {"number": "0..19"}}, "its 'number' is 0..19, and here 0..9"),
    ({"input": {"number": "0..9"}}, "cannot be used"),
    ({"output": {"digit": "10 scores"}}, "its 'output' is {'digit': '10 scores'}, and here"),
]


@pytest.mark.parametrize(("changed", "said"), DESCRIPTIONS)
def test_a_model_without_what_scoring_needs_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    refused(save(tmp_path, **changed), said)


WEIGHTS: dict[str, Callable[[Weights], Any]] = {
    "missing": lambda weights: weights.pop("fc2.bias"),
    "more": lambda weights: weights.update(more=torch.zeros(3)),
    "shape": lambda weights: weights.update({"fc2.bias": torch.zeros(20)}),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_another_network_are_refused(tmp_path: Path, case: str) -> None:
    weights = weights_of(0)
    WEIGHTS[case](weights)
    refused(
        save(tmp_path, weights=weights),
        "cannot be used: Error(s) in loading state_dict for TwoHeadCNN",
    )


def become_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def with_header(file: Path, header: str) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())


DEEP = 100_000 * "["
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "holds no model"),
    "device": (become_a_device, "holds no model"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cannot be used"),
    "other bytes": (
        lambda file: file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1"),
        "is damaged",
    ),
    "deep": (lambda file: with_header(file, DEEP), "cannot be used"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", FILES)
def test_what_is_not_a_model_is_refused(tmp_path: Path, case: str) -> None:
    damage, said = FILES[case]
    place = save(tmp_path)
    damage(tmp_path / "model.safetensors")
    refused(place, said)
