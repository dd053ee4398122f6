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
from mnistsum_ray.task import Settings, Task
from tests.tasks import Points, PointSettings

TASK = Points(PointSettings(hidden=5))
torch.manual_seed(3)
WEIGHTS = copy_weights(TASK.network())


class Other(Points):
    name = "other"


class Narrower(Points):
    Settings = Settings  # type: ignore[assignment]


def save(folder: Path, weights: Any = WEIGHTS, **changed: Any) -> Path:
    """Write a model folder; return the file of the weights."""
    description = describe_model(TASK, weights, "code", epoch=3) | changed
    write_model(locate(str(folder), "--model"), weights, description)
    return folder / "model.safetensors"


def test_a_model_comes_back(tmp_path: Path) -> None:
    weights = save(tmp_path / "run" / "model")
    file = weights.with_name("model.json")
    written = json.loads(file.read_text())
    # A kill between the two files leaves it so: the description is in the file of the weights.
    file.write_text(json.dumps(written | {"sha256": "other"}))
    for place in (tmp_path / "run", tmp_path / "run" / "model", weights):
        loaded = load_model(locate(str(place), "--model"), Points)
        assert checksum(copy_weights(loaded.network)) == checksum(WEIGHTS)
        assert not loaded.network.training
        assert loaded.description == written
        assert loaded.task.settings == TASK.settings, "the network depends on them"
    assert (written["epoch"], written["parameters"]) == (3, 3 * 5 + 5 + 5 * 2 + 2)
    assert written["settings"] == {"hidden": 5, "dropout": None, "kind": "plain"}


def change(folder: Path, changed: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the file of the weights."""
    file = save(folder)
    file.write_bytes(changed(file.read_bytes()))


DEEP = (100_000).to_bytes(8, "little") + b"[" * 100_000
CHANGED: dict[str, Any] = {"settings": {"hidden": 6}}
UNKNOWN: dict[str, Any] = {"settings": {"width": 5}}
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: None, "holds no model"),
    (lambda folder: save(folder, format="else"), "its format is not 'mnistsum_ray/6'"),
    (lambda folder: save(folder, {"x": torch.zeros(3)}), "PointNetwork"),
    (lambda folder: save(folder, **CHANGED), "PointNetwork"),
    (lambda folder: save(folder, **UNKNOWN), "Extra inputs are not permitted"),
    (lambda folder: change(folder, lambda data: data[:-100]), "cannot be used"),
    (lambda folder: change(folder, lambda data: data[:-4] + b"\0\0\0\1"), "is damaged (the SHA"),
    (lambda folder: change(folder, lambda _: DEEP), "cannot be used"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("write", "said"), REFUSED)
def test_what_is_not_a_model_is_refused_in_one_line(tmp_path: Path, write: Any, said: str) -> None:
    write(tmp_path)
    with pytest.raises(RequestError, match=re.escape(said)) as error:
        load_model(locate(str(tmp_path), "--model"), Points)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Other, "its task is points, and not other; add its --task"),
        (Narrower, "Extra inputs are not permitted"),
    ],
)
def test_a_model_of_another_task_is_refused(tmp_path: Path, task: type[Task], said: str) -> None:
    save(tmp_path)
    with pytest.raises(RequestError, match=re.escape(said)):
        load_model(locate(str(tmp_path), "--model"), task)


def test_a_storage_that_does_not_answer_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(file: Location) -> None:
        raise NoAnswerError(f"{file.display}: cannot be read")

    monkeypatch.setattr(Location, "read_bytes", no_answer)
    with pytest.raises(TryAgainError, match=rf"^{tmp_path}\S*: cannot be read$"):
        load_model(locate(str(save(tmp_path)), "--model"), Points)
