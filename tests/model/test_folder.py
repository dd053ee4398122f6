"""A model folder comes back as it was saved; what is no model, or a damaged one, is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnistsum_ray.errors import NoAnswerError, RequestError, TryAgainError
from mnistsum_ray.model.folder import (
    checksum,
    copy_weights,
    describe_model,
    load_model,
    write_model,
)
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.model import new_model

WEIGHTS = copy_weights(new_model(3))


def save(folder: Path, weights: Any = WEIGHTS, **changed: Any) -> Path:
    """Write a model folder; return the file of the weights."""
    description = describe_model(weights, epoch=3, metrics={}) | changed
    write_model(locate(str(folder), "--model"), weights, description)
    return folder / "model.safetensors"


def test_a_model_comes_back(tmp_path: Path) -> None:
    weights = save(tmp_path / "run" / "model")
    file = weights.with_name("model.json")
    written = json.loads(file.read_text())
    # A kill between the two files leaves it so: the description is in the file of the weights.
    file.write_text(json.dumps(written | {"sha256": "other"}))
    for place in (tmp_path / "run", tmp_path / "run" / "model", weights):
        loaded, description = load_model(locate(str(place), "--model"))
        assert checksum(copy_weights(loaded)) == checksum(WEIGHTS)
        assert not loaded.training
        assert description == written
    assert (written["epoch"], written["parameters"]) == (3, 220_125)


def change(folder: Path, changed: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the file of the weights."""
    file = save(folder)
    file.write_bytes(changed(file.read_bytes()))


DEEP = (100_000).to_bytes(8, "little") + b"[" * 100_000
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: None, "holds no model"),
    (lambda folder: save(folder, format="else"), "its format is not 'mnistsum_ray/5'"),
    (lambda folder: save(folder, {"x": torch.zeros(3)}), "TwoHeadCNN"),
    (lambda folder: change(folder, lambda data: data[:-100]), "cannot be used"),
    (lambda folder: change(folder, lambda data: data[:-4] + b"\0\0\0\1"), "is damaged (the SHA"),
    (lambda folder: change(folder, lambda _: DEEP), "cannot be used"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("write", "said"), REFUSED)
def test_what_is_not_a_model_is_refused_in_one_line(tmp_path: Path, write: Any, said: str) -> None:
    write(tmp_path)
    with pytest.raises(RequestError, match=re.escape(said)) as error:
        load_model(locate(str(tmp_path), "--model"))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_storage_that_does_not_answer_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(file: Location) -> None:
        raise NoAnswerError(f"{file.display}: cannot be read")

    monkeypatch.setattr(Location, "read_bytes", no_answer)
    with pytest.raises(TryAgainError, match=rf"^{tmp_path}\S*: cannot be read$"):
        load_model(locate(str(save(tmp_path)), "--model"))
