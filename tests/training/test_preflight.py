"""What a run is asked for, and what its recipe or the run that is resumed fills in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.preflight import preflight


@pytest.fixture
def stored(tmp_path: Path) -> TrainConfig:
    """The config of a run that was started and killed."""
    run = preflight(
        TrainConfig(
            data="sample", storage_path=str(tmp_path), name="mine", epochs=7, learning_rate=0.5, num_workers=2, skip_bad_rows=True
        )
    )
    (tmp_path / "mine").mkdir()
    manifest = {
        "config": run.config.model_dump(mode="json", exclude={"resume"}),
        "data": {"sha256": "ab" * 32, "location": "sample", "notice": ""},
    }
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(manifest))
    return run.config


def test_null_leaves_the_choice_to_the_stored_run(stored: TrainConfig) -> None:
    unset: dict[str, Any] = {"epochs": None, "learning_rate": None, "num_workers": None}
    run = preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=True, **unset))
    assert (run.hyperparameters.epochs, run.hyperparameters.learning_rate) == (7, 0.5)
    assert run.config.num_workers == 2


def test_a_folder_with_files_and_no_run_is_neither_taken_nor_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="mine holds other files, and no run; choose another name"):
        preflight(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine", resume="auto"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": 0.02}, "--learning-rate 0.02: the run mine has 0.5"),
        ({"precision": "bf16"}, "--precision bf16: the run mine has none"),
        ({"skip_bad_rows": False}, "--skip-bad-rows False: the run mine has True"),
    ],
)
def test_what_the_numbers_depend_on_cannot_be_changed(stored: TrainConfig, given: dict[str, Any], said: str) -> None:
    for resume in (True, "auto"):
        with pytest.raises(RequestError, match=f"{said}, and its numbers depend on it; leave the flag out"):
            preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=resume, **given))


def test_ray_stores_checkpoints_where_this_program_looks_for_them(tmp_path: Path) -> None:
    """Arrow, which Ray asks, decodes a URI; this program takes a key as it is written."""
    run = preflight(TrainConfig(data="sample", storage_path=str(tmp_path)))
    key, query = "a b/50%/%20é/#1", "region=x&scheme=http&endpoint_override=127.0.0.1:9"
    for uri, path in {f"s3://bucket/{key}?{query}": f"bucket/{key}", f"/tmp/{key}?": f"/tmp/{key}?"}.items():
        storage = locate(uri, "--storage-path")
        assert FileSystem.from_uri(replace(run, storage=storage).ray_storage)[1] == path


def test_a_manifest_that_does_not_say_what_the_run_was_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for text in ("{", "[]", '{"config": {}}', "[" * 100_000):
        (tmp_path / "mine" / "manifest.json").write_text(text)
        with pytest.raises(RequestError, match=r"--resume: .*; start another run"):
            preflight(TrainConfig(storage_path=str(tmp_path), name="mine", resume=True))
