"""What a run is asked for, what is filled in, and how a run ends that Ray Train gives up."""

import io
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions
import ray.train
from pyarrow.fs import FileSystem

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.data.columns.base import ReasonCounts
from mnistsum_ray.errors import (
    NoAnswerError,
    RepeatingError,
    RequestError,
    RunError,
    StorageError,
    TryAgainError,
)
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.report import versions
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import arrow_uri, folder_lock, locate
from mnistsum_ray.task_loader import code_of
from mnistsum_ray.training import job
from mnistsum_ray.training.progress import FailureLines
from mnistsum_ray.training.record import RunRecord
from mnistsum_ray.training.request import TrainRequest, check_request
from mnistsum_ray.training.rows import Rows
from tests.tasks import Points

SETTINGS: dict[str, Any] = {
    "epochs": 7,
    "learning_rate": 0.5,
    "num_workers": 2,
    "skip_bad_rows": True,
}
"""Of a run that was started and killed."""


def asked(**given: Any) -> TrainRequest:
    """The run `mine` in the working folder, with sample data."""
    settings = {"data": "sample", "storage_path": ".", "name": "mine"} | given
    return check_request(TrainConfig(**settings))


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The config of a run that was started and killed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"^--init-from \S*/base: does not exist"):
        asked(**SETTINGS, init_from="base")
    (tmp_path / "base").mkdir()
    request = asked(**SETTINGS, init_from="base")
    (tmp_path / "base").rmdir()  # it is needed no more
    data = {"fingerprint": "0" * 64, "location": "sample", "notice": ""}
    (tmp_path / "mine").mkdir()
    manifest = {"config": request.config.model_dump(mode="json", exclude={"resume"}), "data": data}
    manifest["task"] = {"name": "mnistsum", "code": code_of(MnistSum)}
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(manifest))
    return request.config


def test_a_resumed_run_keeps_what_is_not_given_or_null_and_the_model_that_it_began_with(
    stored: TrainConfig,
) -> None:
    """With `--resume auto` a later command is the first one again, also with a relative path."""
    unset = dict.fromkeys(("epochs", "learning_rate", "num_workers", "init_from"))
    for given in (unset, {"init_from": stored.init_from}, {"init_from": "base"}):
        config = asked(resume="auto", **given).config
        assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
        assert config.init_from == stored.init_from
        assert TrainConfig(**dict(config)) == config


def test_a_finished_run_takes_the_precision_that_its_config_file_names(stored: TrainConfig) -> None:
    file = Path("mine", "manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": "fp32"}))
    assert asked(resume=True, precision="fp32").config.epochs == stored.epochs


FIXED = [
    ({"learning_rate": 0.02}, "--learning-rate 0.02: the run mine has 0.5"),
    ({"precision": "bf16"}, "--precision bf16: the run mine has null"),
    ({"max_rows": 9}, "--max-rows 9: the run mine has null"),
    ({"skip_bad_rows": False}, "--skip-bad-rows false: the run mine has true"),
    ({"dropout": 0.3}, "--dropout 0.3: the run mine has 0.0"),
    ({"label_column": "x"}, "--label-column x: the run mine has null"),
    ({"init_from": "/other"}, "--init-from /other: the run mine has .*/base"),
]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("given", "said"), FIXED)
def test_what_the_numbers_depend_on_cannot_be_changed(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=f"{said}, and its numbers depend on it; leave the flag"):
        asked(resume=True, **given)


def test_a_run_is_resumed_with_its_own_task_and_a_line_says_if_its_file_has_changed(
    stored: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"mine is of the task mnistsum, and not points; add i"):
        asked(resume=True, task=Points)
    monkeypatch.setattr("mnistsum_ray.training.request.code_of", lambda _: "another")
    changed = "the file of the task mnistsum has changed since the run began"
    request = asked(resume=True)
    said = f"{changed}; the run continues, with metrics of both"
    assert (request.notice, request.config.epochs) == (said, 7)


def points_of(**attributes: Any) -> Any:
    return type("Changed", (Points,), attributes)


WRONG: list[tuple[dict[str, Any], Any, str]] = [
    (
        {"bf16": False},
        {"precision": "bf16"},
        "--precision bf16: is not precise enough for the task",
    ),
    ({"defaults": lambda *_: {"epochs": 3}}, {}, "task points: defaults must have 'batch_size'"),
    (
        {"defaults": lambda *_: DEFAULTS | {"x": 1}},
        {},
        "task points: defaults has 'x', which is no",
    ),
    (
        {"loss": lambda *_: 1},
        {},
        "task points: loss must return a tensor of floating-point numbers",
    ),
]
DEFAULTS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "dropout": 0.2}


def test_a_task_sets_what_is_not_given_and_is_tried_before_anything_runs(tmp_path: Path) -> None:
    rows = pa.table({"place": [[0.0, 1.0, 2.0]] * 50, "which": ["0", "1"] * 25})
    pq.write_table(rows, tmp_path / "rows.parquet")
    given: dict[str, Any] = {"data": tmp_path, "storage_path": tmp_path / "runs"}
    task = points_of(defaults=lambda *_: DEFAULTS)
    request = asked(**given, task=task, epochs=7)
    assert (request.hyperparameters.epochs, request.hyperparameters.batch_size) == (7, 8)
    assert request.task.settings.dropout == request.config.model_dump()["dropout"] == 0.2
    assert request.source.files["train"][0].columns == {"place": "place", "side": "which"}
    assert " --task " in request.how_to_resume
    for attributes, flags, said in WRONG:
        with pytest.raises(RequestError, match=f"^{said}"):
            asked(**given, **flags, task=points_of(**attributes))


def test_a_first_try_has_some_rows_of_each_split_and_of_all_digits(
    tmp_path: Path, sample: pa.Table
) -> None:
    for index in range(8):  # of 100 rows each
        pq.write_table(sample[index::50], tmp_path / f"{index}.parquet")
    source = asked(max_rows=300, data=tmp_path).source
    assert ([file.rows for file in source.files["train"]], source.train_rows) == ([100] * 4, 300)


def test_a_folder_without_a_run_is_neither_taken_nor_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    taken = "mine has other files but no run; choose another name"
    with pytest.raises(RequestError, match=taken):
        asked(storage_path=str(tmp_path), resume="auto")
    for text in ("{", "[]", '{"config": {}}'):
        (tmp_path / "mine" / "manifest.json").write_text(text)
        with pytest.raises(RequestError, match=r"--resume: .*; start another run"):
            asked(storage_path=str(tmp_path), resume=True)


def test_a_store_that_ray_does_not_reach_is_refused_before_rows_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For Azure Arrow wants the account in the URI; in the environment it is enough for scoring."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    for given in ({"storage_path": "abfs://container/runs"}, {"data": "abfs://container/rows"}):
        with pytest.raises(
            RequestError, match=r"abfs://container: Ray, which uses Arrow, does not"
        ):
            asked(**given)


def test_a_run_that_cannot_begin_is_to_be_tried_again_and_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is held by another one, or the storage does not answer."""

    def fail(*_: Any) -> None:
        raise NoAnswerError("--storage-path no answer")

    request = asked(storage_path=str(tmp_path))
    with (
        folder_lock(request.folder, "--name"),
        pytest.raises(TryAgainError, match=r"another run .* is writing there"),
    ):
        job.train(request, Console(io.StringIO()))
    monkeypatch.setattr(job, "wait_for", fail)
    said = "^--storage-path no answer; nothing was begun; the same command tries again$"
    # So it is with a run that was finished, and whose model has lost one of its files.
    (request.folder / "model" / "model.safetensors").write(b"")
    for again in (request, replace(request, stored={"status": "finished"})):
        with pytest.raises(TryAgainError, match=said):
            job.train(again, Console(io.StringIO()))


def test_a_run_that_goes_on_with_other_versions_or_workers_says_so() -> None:
    said: list[str] = []
    plan = WorkerPlan(1, 4, {"CPU": 2.0}, 2)
    stored = {"versions": versions(), "workers": "1 to 4 CPU workers of 2 threads", "threads": 2}
    for same in ({}, stored):  # a run that begins, and one that goes on
        job.say_what_differs(same, plan, said.append)
    assert said == []
    had = {"versions": versions() | {"torch": "2.0", "numpy": "1.0"}, "workers": "2 CPU workers"}
    job.say_what_differs(stored | had, plan, said.append)
    first, second = said
    torch = f"torch 2.0, and continues with torch {version('torch')}: its last bits may differ"
    assert first == f"the run had {torch}"
    assert second.startswith(
        "the run had 2 CPU workers, and continues with 1 to 4 CPU workers of 2 t"
    )
    assert second.endswith(
        "may differ (as many workers, with --use-gpu false --threads 2, keep them)"
    )


def test_the_seed_of_a_run_also_orders_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: dict[str, Any] = {}

    def read_rows(_source: Any, columns: Any, seed: int, **settings: Any) -> Rows:
        assert columns == MnistSum().training_columns
        asked_for.update(settings, seed=seed)
        return Rows({}, {}, 32, ReasonCounts(), {"digit": {5, 9}})

    monkeypatch.setattr(job, "read_rows", read_rows)
    plan = WorkerPlan(1, 3, {"CPU": 2.0}, 2)
    request, said = asked(seed=7, skip_bad_rows=True), io.StringIO()
    job.read(request, plan, Console(said), is_kept=False)
    assert "no training row has the digit 5, 9\n" in said.getvalue()
    assert asked_for.pop("show_progress")
    assert asked_for == {"seed": 7, "skip_bad_rows": True, "is_kept": False, "workers": 3}


def ended(request: TrainRequest, error: Exception) -> RunError:
    """The error of a job whose `fit` raises this one."""
    console = Console(io.StringIO())
    with pytest.raises(RunError) as raised, job.errors_in_one_line(console, request.how_to_resume):
        raise error
    return raised.value


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (ValueError("in a callback"), RunError, "Ray Train gave up: ValueError: in a callback; "),
        (OSError("SLOW_DOWN"), TryAgainError, "Ray Train gave up: OSError: SLOW_DOWN; "),
        (StorageError("ExpiredToken"), RunError, "ExpiredToken; checkpoints are kept"),
        (NoAnswerError("503"), TryAgainError, "503; checkpoints are kept"),
        (RepeatingError("the loss is nan"), RunError, "the loss is nan"),
        (ray.exceptions.ActorDiedError(), TryAgainError, "Ray Train gave up: ActorDiedError: "),
    ],
)
def test_a_run_that_ray_train_gives_up_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: Exception,
    kind: type[RunError],
    said: str,
) -> None:
    monkeypatch.setattr(job, "describe_free", lambda: "1 CPU is free")
    error = ended(asked(storage_path=tmp_path), ray.train.ControllerError(cause))
    assert type(error) is kind
    assert str(error).startswith(said)
    assert str(error).endswith("--name mine --resume") or kind is RunError


def test_a_run_whose_workers_fail_too_often_says_how_to_resume(tmp_path: Path) -> None:
    error = ended(asked(storage_path=tmp_path), ray.train.WorkerGroupError("", {0: OSError()}))
    assert type(error) is RunError
    assert str(error).startswith("workers have failed more often than --max-failures allows, see ")
    assert str(error).endswith("--name mine --resume")


def test_a_storage_that_refuses_ends_a_run_at_the_first_failure_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that have expired: to Ray Train that is a failure of workers like any other."""
    request = asked(storage_path=tmp_path)
    said: Any = SimpleQueue()
    lines = FailureLines(said, request.folder)
    of_worker: dict[int, Exception] = {1: OSError("HTTP status 400")}
    lines.after_exception(None, of_worker)
    assert said.get()["text"].startswith("worker 1 failed: HTTP status 400")
    assert not request.folder.files()

    def refuse(_self: Location, _value: Any) -> None:
        raise StorageError("cannot be written: ExpiredToken")

    monkeypatch.setattr(Location, "write", refuse)
    with pytest.raises(StorageError, match="ExpiredToken"):
        lines.after_exception(None, of_worker)


def test_ray_stores_checkpoints_where_this_program_looks_for_them() -> None:
    """Arrow, which Ray asks, decodes a URI; this program takes a key as it is written."""
    key = "a b/50%/%20é/#1"
    in_store = f"s3://bucket/{key}?region=x&scheme=http&endpoint_override=127.0.0.1:9"
    for uri, path in ((in_store, f"bucket/{key}"), (f"/tmp/{key}?", f"/tmp/{key}?")):
        found = FileSystem.from_uri(arrow_uri(locate(uri, "--storage-path") / "checkpoints"))[1]
        assert found == f"{path}/checkpoints"


def test_a_run_writes_no_status_over_that_of_another_which_has_begun_since(tmp_path: Path) -> None:
    """In a bucket nothing keeps two runs of one name apart."""
    request = asked(storage_path=str(tmp_path))
    record = RunRecord(request, WorkerPlan(1, 1, {"CPU": 2.0}, 2), [])
    record.manifest = {"status": "running", "started": "09:00"}
    file = request.folder / "manifest.json"
    for written, expected in (("10:00", "finished"), ("09:00", "failed")):
        file.write({"status": "finished", "started": written})
        record.write_status("failed")
        assert file.read_json()["status"] == expected
