"""What a run is asked for, and what its recipe or a stored run fills in."""

import json
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.preflight import preflight


def test_a_flag_wins_over_the_recipe() -> None:
    assert preflight(TrainConfig(data="sample", recipe="quick")).hyperparameters.learning_rate == 0.05
    assert preflight(TrainConfig(data="sample", recipe="quick", learning_rate=0.5)).hyperparameters.learning_rate == 0.5


@pytest.fixture
def stored(tmp_path: Path) -> TrainConfig:
    """The config of a run that was started and killed."""
    run = preflight(
        TrainConfig(data="sample", storage_path=str(tmp_path), name="mine", epochs=7, learning_rate=0.5, num_workers=2)
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
    assert (run.hyperparameters.epochs, run.hyperparameters.dropout, run.hyperparameters.learning_rate) == (40, 0.25, 0.3)
    assert run.hyperparameters.seed == stored.seed


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_folder_with_files_and_no_run_is_neither_taken_nor_resumed(tmp_path: Path, resume: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="mine holds other files, and no run; choose another name"):
        preflight(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine", resume=resume))


def test_another_learning_rate_is_refused(stored: TrainConfig) -> None:
    with pytest.raises(RequestError, match=r"--learning-rate 0.02: the run mine has 0.5"):
        preflight(TrainConfig(storage_path=stored.storage_path, name="mine", resume=True, learning_rate=0.02))
