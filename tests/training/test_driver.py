"""The driver before a run has begun, and what it does with events; the rest: tests/integration."""

import io
from pathlib import Path
from typing import Any

import pytest
from mnistsum_ray.training.events import EventFollower
from mnistsum_ray.training.preflight import TrainingRun, preflight

from mnistsum_ray.cluster import resources
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RunError, TryAgainError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.training import driver, events


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    return preflight(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine"))


def test_a_folder_is_held_by_one_run(run: TrainingRun) -> None:
    with (
        folder_lock(run.folder, "--name"),
        pytest.raises(TryAgainError, match=r"another run .* is writing there"),
    ):
        driver.fit(run, Console(io.StringIO()))


def test_a_run_that_has_not_begun_is_not_to_be_resumed(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(resources, "reserve", fail)
    said = "^--storage-path no answer; nothing was begun; the same command tries again$"
    with pytest.raises(RunError, match=said):
        driver.fit(run, Console(io.StringIO()))


def test_a_training_is_ended_whose_workers_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "Queue", lambda **_: None)
    monkeypatch.setattr(events, "on_node", dict)
    monkeypatch.setattr(events, "_MIN_SILENCE_SECONDS", -1.0)
    nothing: Any = None
    follower = EventFollower(Console(io.StringIO()), nothing, nothing, wait_seconds=-1.0)
    ended: list[float | None] = []
    follower._look_for_silence()
    follower.end_if_silent(lambda: ended.append(follower.gave_up_after))
    follower._look_for_silence()
    follower._look_for_silence()
    assert ended == [follower.gave_up_after]
