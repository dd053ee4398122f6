"""A model folder comes back as it was saved; what is no model, or a damaged one, is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.folder import (
    Weights,
    checksum,
    copy_weights,
    describe_model,
    load_model,
    write_model,
)
from mnistsum_ray.storage.uri import locate
from tests.model import new_model


def save(folder: Path, weights: Weights | None = None, **changed: Any) -> None:
    weights = weights or copy_weights(new_model(3))
    description = describe_model(weights, epoch=3, metrics={}) | changed
    write_model(locate(str(folder), "--model"), weights, description)


def test_a_model_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "run" / "model")
    file = tmp_path / "run" / "model" / "model.json"
    written = json.loads(file.read_text())
    # A kill between the two files leaves it so: the description is in the file of the weights.
    file.write_text(json.dumps(written | {"sha256": "other"}))
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, description = load_model(locate(str(folder), "--model"))
        assert checksum(copy_weights(loaded)) == checksum(copy_weights(new_model(3)))
        assert not loaded.training
        assert description == written
    assert (written["epoch"], written["parameters"]) == (3, 220_125)


def described(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: save(folder, **changed)


def filed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of the file of the weights."""

    def write(folder: Path) -> None:
        save(folder)
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return write


DEEP = (100_000).to_bytes(8, "little") + b"[" * 100_000
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (lambda folder: None, "holds no model"),
    "version": (described(format="else"), "its format is not 'mnistsum_ray/5'"),
    "network": (described(network="Other"), "its 'network' is Other, and here TwoHeadCNN"),
    "tensors": (described(weights={"x": torch.zeros(3)}), "TwoHeadCNN"),
    "cut short": (filed(lambda data: data[:-100]), "cannot be used"),
    "other bytes": (filed(lambda data: data[:-4] + b"\0\0\0\1"), "is damaged (the SHA-256 of"),
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
