"""What a run is asked for, and what its recipe or a stored run fills in."""

import json
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
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
        "config": run.config.model_dump(mode="json", exclude={"config", "resume"}),
        "data": {"sha256": "ab" * 32, "location": "sample", "notice": ""},
    }
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(manifest))
    return run.config


def test_null_leaves_the_choice_to_the_stored_run(stored: TrainConfig) -> None:
    """The YAML of `--print-config` has null for what the recipe fills in."""
    unset = {"epochs": None, "learning_rate": None, "num_workers": None}
    resumed = preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=True, **unset))
    again = preflight(TrainConfig(from_run=f"{stored.storage_path}/mine", storage_path=stored.storage_path, **unset))
    for run in (resumed, again):
        assert (run.hyperparameters.epochs, run.hyperparameters.learning_rate) == (7, 0.5)
        assert run.config.num_workers == 2


def test_another_recipe_sets_what_it_sets_and_flags_win(stored: TrainConfig) -> None:
    of = {"from_run": f"{stored.storage_path}/mine", "storage_path": stored.storage_path}
    run = preflight(TrainConfig(recipe="long", learning_rate=0.3, **of))
    assert run.config.skip_bad_rows, "of that run"
    assert (run.hyperparameters.epochs, run.hyperparameters.dropout, run.hyperparameters.learning_rate) == (40, 0.25, 0.3)
    assert run.hyperparameters.seed == stored.seed


def test_a_folder_with_files_and_no_run_is_neither_taken_nor_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="mine holds other files, and no run; choose another name"):
        preflight(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine", resume="auto"))


@pytest.mark.parametrize(
    ("resume", "given", "said"),
    [
        (True, {"learning_rate": 0.02}, "--learning-rate 0.02: the run mine has 0.5"),
        (True, {"precision": "bf16"}, "--precision bf16: the run mine has none"),
        (True, {"skip_bad_rows": False}, "--skip-bad-rows False: the run mine has True"),
        ("auto", {"from_run": "runs/other"}, "--from-run runs/other: the run mine has none"),
    ],
)
def test_what_the_numbers_depend_on_cannot_be_changed(stored: TrainConfig, resume: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=f"{said}, and its numbers depend on it; leave the flag out"):
        preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=resume, **given))


@pytest.mark.parametrize("where", ["manifest.json", "epoch_00001/trainer.json"])
def test_the_precision_that_the_workers_have_chosen_is_that_of_the_run(stored: TrainConfig, where: str) -> None:
    """Only the checkpoints know it before the run is finished."""
    runs = Path(stored.storage_path)
    file, torn = runs / "mine" / where, runs / "mine" / "epoch_00000" / "trainer.json"
    for path, text in ((torn, "{"), (file, json.dumps({"precision": "fp32"}))):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(text)) if path.exists() else text)
    place = {"storage_path": stored.storage_path, "name": "mine", "resume": True}
    resumed = [preflight(TrainConfig(**place, **given)) for given in ({}, {"precision": "fp32"})]
    again = preflight(TrainConfig(storage_path=stored.storage_path, from_run=str(runs / "mine")))
    assert {run.hyperparameters.precision for run in (*resumed, again)} == {"fp32"}
    with pytest.raises(RequestError, match="--precision bf16: the run mine has fp32, and its numbers"):
        preflight(TrainConfig(**place, precision="bf16"))


def test_the_same_command_goes_on_with_a_run_that_was_begun_from_another_that_is_gone(stored: TrainConfig) -> None:
    """As cron gives it."""
    manifest = Path(stored.storage_path, "mine", "manifest.json")
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(text | {"config": text["config"] | {"from_run": "runs/gone"}}))
    place = {"storage_path": stored.storage_path, "name": "mine", "resume": "auto"}
    for given in ({}, {"from_run": None}, {"from_run": "runs/gone"}):
        assert preflight(TrainConfig(**place, **given)).config.from_run == "runs/gone"


def test_a_run_that_began_before_bad_rows_could_be_skipped_is_resumed(stored: TrainConfig) -> None:
    manifest = Path(stored.storage_path, "mine", "manifest.json")
    text = json.loads(manifest.read_text())
    del text["config"]["skip_bad_rows"]
    manifest.write_text(json.dumps(text))
    assert not preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=True)).config.skip_bad_rows


def test_a_manifest_that_does_not_say_what_the_run_was_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for text in ("{", "[]", '{"config": {}}', "[" * 100_000):
        (tmp_path / "mine" / "manifest.json").write_text(text)
        with pytest.raises(RequestError, match=r"--resume: .*; start another run"):
            preflight(TrainConfig(storage_path=str(tmp_path), name="mine", resume=True))
    with pytest.raises(RequestError, match="--from-run: there is no run in"):
        preflight(TrainConfig(from_run=str(tmp_path), storage_path=str(tmp_path)))
