"""What a run is asked for, and what its recipe or the run that is resumed fills in."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mnistsum_ray.training.preflight import TrainingRun, preflight
from pyarrow.fs import FileSystem

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.uri import locate

SETTINGS: dict[str, Any] = {
    "epochs": 7,
    "learning_rate": 0.5,
    "num_workers": 2,
    "skip_bad_rows": True,
}
"""Of a run that was started and killed."""


def asked(**given: Any) -> TrainingRun:
    """The run `mine` in the working folder, with sample data."""
    settings = {"data": "sample", "storage_path": ".", "name": "mine"} | given
    return preflight(TrainConfig(**settings))


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The config of a run that was started and killed."""
    monkeypatch.chdir(tmp_path)
    config = asked(**SETTINGS, init_from="base").config
    data = {"sha256": "ab" * 32, "location": "sample", "notice": ""}
    (tmp_path / "mine").mkdir()
    manifest = {"config": config.model_dump(mode="json", exclude={"resume"}), "data": data}
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(manifest))
    return config


def test_a_resumed_run_keeps_what_is_not_given_or_null_and_the_model_that_it_began_with(
    stored: TrainConfig,
) -> None:
    """With `--resume auto` a later command is the first one again, also with a relative path."""
    unset = dict.fromkeys(("epochs", "learning_rate", "num_workers", "init_from"))
    for given in (unset, {"init_from": stored.init_from}, {"init_from": "base"}):
        config = asked(resume="auto", **given).config
        assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
        assert config.init_from == stored.init_from


FIXED = [
    ({"learning_rate": 0.02}, "--learning-rate 0.02: the run mine has 0.5"),
    ({"precision": "bf16"}, "--precision bf16: the run mine has none"),
    ({"init_from": "/other"}, "--init-from /other: the run mine has .*/base"),
]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("given", "said"), FIXED)
def test_what_the_numbers_depend_on_cannot_be_changed(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=f"{said}, and its numbers depend on it; leave the flag"):
        asked(resume=True, **given)


PLACES = [
    (".", "runs/deep", "lies in --data"),
    ("in", "link/runs", "lies in --data"),
    ("in", "in-runs", ""),
    ("in", ".", ""),
]


@pytest.mark.parametrize(("data", "storage", "said"), PLACES)
def test_a_storage_path_inside_the_data_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: pa.Table,
    data: str,
    storage: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("link").symlink_to("in")
    pq.write_table(sample[::50], "in/rows.parquet")
    before = sorted(Path().rglob("*"))
    error = f"^--storage-path {tmp_path}.* {said} .*; put it elsewhere$"
    with pytest.raises(RequestError, match=error) if said else nullcontext():
        asked(data=data, storage_path=storage)
    assert sorted(Path().rglob("*")) == before


def test_a_folder_without_a_run_is_neither_taken_nor_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    taken = "mine holds other files, and no run; choose another name"
    with pytest.raises(RequestError, match=taken):
        asked(storage_path=str(tmp_path), resume="auto")
    for text in ("{", "[]", '{"config": {}}'):
        (tmp_path / "mine" / "manifest.json").write_text(text)
        with pytest.raises(RequestError, match=r"--resume: .*; start another run"):
            asked(storage_path=str(tmp_path), resume=True)


def test_ray_stores_checkpoints_where_this_program_looks_for_them(tmp_path: Path) -> None:
    """Arrow, which Ray asks, decodes a URI; this program takes a key as it is written."""
    run, key = asked(storage_path=str(tmp_path)), "a b/50%/%20é/#1"
    in_store = f"s3://bucket/{key}?region=x&scheme=http&endpoint_override=127.0.0.1:9"
    for uri, path in ((in_store, f"bucket/{key}"), (f"/tmp/{key}?", f"/tmp/{key}?")):
        of_ray = replace(run, folder=locate(uri, "--storage-path")).ray_storage("checkpoints")
        assert FileSystem.from_uri(of_ray)[1] == f"{path}/checkpoints"
