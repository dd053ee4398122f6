"""A run: its checked request, its folder, and what is written there.

Neither torch nor Ray, which take seconds, is imported for the check: a wrong request is refused at
once.
"""

import json
import secrets
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import yaml

from mnistsum_ray.config import Hyperparameters, TrainConfig
from mnistsum_ray.data.sources import ColumnInFiles, Source, StartProgress, open_source
from mnistsum_ray.errors import (
    MissingFileError,
    RequestError,
    RunError,
    one_line,
    shell_command,
    shortened,
    spelled,
)
from mnistsum_ray.reporting.results import MANIFEST, HeldOutMetrics, SplitRows, TrainResult
from mnistsum_ray.storage.bucket import check_ray_reaches
from mnistsum_ray.storage.store import Location, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing, output_base_folder
from mnistsum_ray.task import BUILT_IN, Task
from mnistsum_ray.task_loader import code_of

if TYPE_CHECKING:
    from mnistsum_ray.cluster.resources import WorkerPlan
    from mnistsum_ray.model.finished import FinishedModel
    from mnistsum_ray.training.rows import Rows

_HYPERPARAMETERS: Final = [parameter.name for parameter in fields(Hyperparameters)]

_FIXED_BY_RUN: Final = ("skip_bad_rows", "max_rows", "init_from", *_HYPERPARAMETERS)
"""Fields that `--resume` may not change, beside the task's columns and settings."""


@dataclass(frozen=True)
class TrainRequest:
    """A checked request: task, hyperparameters, data and folder."""

    config: TrainConfig
    task: Task  # with its settings
    hyperparameters: Hyperparameters
    source: Source
    folder: Location  # the run folder `<storage_path>/<name>`
    stored: dict[str, Any]  # manifest of the run that is resumed; else empty
    notice: str = ""  # for the console

    @property
    def how_to_resume(self) -> str:
        """End of an error message: the command that resumes the run."""
        flags = ["--storage-path", self.config.storage_path, "--name", str(self.config.name)]
        if self.config.task != BUILT_IN:
            flags += ["--task", self.config.task]
        command = f"{shell_command('train')} {shlex.join(flags)} --resume"
        return f"checkpoints are kept, and this command resumes: {command}"


def check_request(config: TrainConfig, start_progress: StartProgress | None = None) -> TrainRequest:
    """Check the request and fill in its defaults; a progress shows how many footers are read."""
    storage = locate(config.storage_path, "--storage-path", output_base_folder())
    name = (
        config.name
        or f"{config.task_class.name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    )
    folder = storage / name
    if config.init_from:  # before it is compared with the absolute path of a stored run
        model = locate_existing(config.init_from, "--init-from").display
        config = config.model_copy(update={"init_from": model})
    stored: dict[str, Any] = {}
    notice = ""
    with as_request_error("--storage-path"):
        check_ray_reaches(storage)
        # A run that was killed before it wrote its manifest has done nothing: its name is free.
        begun = (folder / MANIFEST).exists()
        resume = begun if config.resume == "auto" else config.resume
        if resume:
            stored, stored_config = _read_run(folder, config)
            notice = _check_same_task(config, stored)
            config = _resumed(config, stored_config)
        else:
            _check_free(folder, name, begun)
            if config.init_from and not locate(config.init_from, "--init-from").exists():
                raise RequestError(f"--init-from {config.init_from}: is not there")
    task = config.task_class(config.settings)
    columns = {}
    for key, column in task.training_columns.items():
        columns[key] = ColumnInFiles(column, config.flag_of(key), config.columns[key])
    if config.data is None:
        raise RequestError("--data: required; a folder or URI of Parquet files")
    source = open_source(task, config.data, columns, start_progress).limited(config.max_rows)
    chosen = _task_defaults(task, config, source.train_rows)
    # Absolute paths, so that --resume from another folder finds the same data.
    chosen |= {"name": name, "storage_path": storage.display, "resume": resume}
    chosen["data"] = source.data
    config = config.model_copy(update=chosen)
    hyperparameters = Hyperparameters(**{key: getattr(config, key) for key in _HYPERPARAMETERS})
    task = config.task_class(config.settings)
    if not task.bf16 and config.precision == "bf16":
        raise RequestError(f"--precision bf16: is not precise enough for the task {task.name}")
    if config.task != BUILT_IN:
        from mnistsum_ray.model.trial import try_task  # imports torch

        try_task(task)
    return TrainRequest(config, task, hyperparameters, source, folder, stored, notice)


def _task_defaults(task: Task, config: TrainConfig, train_rows: int) -> dict[str, Any]:
    """What the task sets of what is not given. RequestError: it sets too little, or too much."""
    try:
        defaults = dict(task.defaults(train_rows))
    except Exception as error:  # of anybody's code
        problem = f"{type(error).__name__}: {shortened(one_line(error))}"
        raise RequestError(f"task {task.name}: defaults raised {problem}") from error
    for key in ("epochs", "batch_size", "learning_rate"):
        if key not in defaults:
            raise RequestError(f"task {task.name}: defaults must have {key!r}")
    known = {*_HYPERPARAMETERS, *config.setting_fields}
    unknown = sorted(defaults.keys() - known)
    if unknown:
        raise RequestError(f"task {task.name}: defaults has {unknown[0]!r}, which is no setting")
    return {key: value for key, value in defaults.items() if getattr(config, key) is None}


def _check_same_task(config: TrainConfig, stored: dict[str, Any]) -> str:
    """RequestError: the task's file is not that of the run. Returns a line if that is accepted."""
    if stored["task"]["code"] == code_of(config.task_class):
        return ""
    changed = f"the file of the task {config.task_class.name} has changed since the run began"
    if not config.changed_task:
        advice = "--changed-task true goes on with it, with numbers of both; or start another run"
        raise RequestError(f"--resume: {changed}; {advice}")
    return f"{changed}; the run goes on with it"


def _check_free(folder: Location, name: str, begun: bool) -> None:
    taken = f"--name {name}: {folder.display}"
    if begun:
        raise RequestError(f"{taken} exists; go on with --resume, or choose another name")
    is_file = folder.file_entry() is not None
    names = [file.path.removeprefix(folder.path).lstrip("/") for file in folder.files()]
    visible = [name for name in names if not is_hidden(name)]  # `_lock` and `.probe` are ours
    if is_file or visible:
        raise RequestError(f"{taken} holds other files, and no run; choose another name")


def _resumed(config: TrainConfig, stored_config: TrainConfig) -> TrainConfig:
    """The config of the run that is resumed, with the fields that are given now.

    RequestError: a field would change its numbers.
    """
    # A null, as a YAML file may have it, leaves the choice to the stored run.
    asked = {key: getattr(config, key) for key in config.model_fields_set}
    given = {key: value for key, value in asked.items() if value is not None}
    of_task = (*config.column_fields.values(), *config.setting_fields)
    for key in (*_FIXED_BY_RUN, *of_task):
        has = getattr(stored_config, key)
        if key in given and given[key] != has:
            flag = f"--{key.replace('_', '-')} {spelled(given[key])}"
            raise RequestError(
                f"{flag}: the run {config.name} has {spelled(has)}, and its "
                "numbers depend on it; leave the flag out, or start another run"
            )
    return stored_config.model_copy(update=given)


def _read_run(folder: Location, given: TrainConfig) -> tuple[dict[str, Any], TrainConfig]:
    """The manifest of a run, and its config.

    RequestError: there is none that can be read, or it is of another task than the given one.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = path.read_json()
        name, code = manifest["task"]["name"], manifest["task"]["code"]
        if not isinstance(code, str):
            raise TypeError("code")
        if name != given.task_class.name:
            other = f"is of the task {name}, and not {given.task_class.name}; give its --task"
            raise RequestError(f"--resume: the run {folder.display} {other}")
        # No code is loaded because a file says so: the task is the given one.
        config = type(given)(**manifest["config"] | {"task": given.task_class})
        if not {"fingerprint", "location", "notice"} <= set(manifest["data"]):
            raise KeyError("data")
        # What a finished run has chosen. Its config.yaml has it too, and may be given again.
        config = config.model_copy(
            update={"precision": manifest.get("precision", config.precision)}
        )
    except MissingFileError:
        problem = f"there is no run in {folder.display} (no {MANIFEST}); start it without --resume"
        raise RequestError(f"--resume: {problem}") from None
    except (ValueError, KeyError, TypeError) as error:
        if str(error).startswith("--resume: "):
            raise
        problem = "is damaged, or of another version; start another run"
        raise RequestError(f"--resume: {path.display} {problem}") from None
    return manifest, config


_NOT_OF_THE_RUN: Final = {"resume", "changed_task"}
"""Fields that say how a run goes on, and not what it is."""


def check_storage(run: Location) -> None:
    """StorageError: the folder of a run cannot be written now, also after 50 s of trying.

    Keys that have expired look to Ray Train like workers that fail.
    """
    probe = run / ".probe"  # a file of its own, since the driver may be writing the manifest now
    probe.write({})
    probe.delete()


@dataclass
class RunRecord:
    """Writes config.yaml, history.jsonl and manifest.json of a run."""

    request: TrainRequest
    plan: "WorkerPlan"
    history: list[dict[str, Any]]  # lines of history.jsonl, one an epoch
    manifest: dict[str, Any] = field(default_factory=dict)  # what the file has since `begin`

    def begin(self, rows: "Rows", init_from: dict[str, str] | None) -> None:
        """Write the manifest of a run that begins or goes on."""
        from mnistsum_ray.reporting.report import versions

        request, plan, source = self.request, self.plan, self.request.source
        # Results of a run that is resumed stay until there are new ones.
        self.manifest = request.stored | {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": {"name": request.task.name, "code": code_of(type(request.task))},
            "config": request.config.model_dump(mode="json", exclude=_NOT_OF_THE_RUN),
            "versions": versions(),
            "workers": str(plan),
            "threads": plan.threads,
            "data": {
                "source": source.name,
                "location": source.location,
                # The config of a run that is resumed names the data that `--data auto` found, so
                # only the first manifest says that it is a sample.
                "notice": source.notice or request.stored.get("data", {}).get("notice", ""),
                "fingerprint": rows.fingerprint,
                **{f"{split}_rows": totals.rows for split, totals in rows.totals.items()},
                "bad_rows": {"rows": rows.rejected.total, **vars(rows.rejected)},
            },
        }
        if init_from:
            self.manifest["init_from"] = init_from
        file = request.folder / MANIFEST
        write = file.write if request.config.resume else file.create
        write(self.manifest)

    def write_status(self, status: str) -> None:
        """Write how the run ends, unless it is finished; an error here must not hide the reason."""
        if self.manifest["status"] == "finished":
            return
        file = self.request.folder / MANIFEST
        with suppress(OSError, RunError, ValueError, KeyboardInterrupt):
            # In a bucket another run of this name may have begun, or have finished.
            if file.read_json().get("started") == self.manifest["started"]:
                file.write(self.manifest | {"status": status})

    def add_epoch(self, line: dict[str, Any]) -> None:
        """Write history.jsonl with one more epoch, unless the whole of it was published."""
        if self.manifest["status"] == "finished":
            return
        self.history = [*self.history[: line["epoch"] - 1], line]
        self._write_history()

    def _write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        (self.request.folder / "history.jsonl").write(lines.encode())

    def _write_config(self, precision: str) -> None:
        """Write config.yaml: the config of the run, with what it has chosen, for another run."""
        plan = self.plan
        chosen = {
            "num_workers": plan.num_workers,
            "use_gpu": plan.use_gpu,
            "threads": plan.threads,
            "precision": precision,
        }
        config = self.request.config.model_copy(update=chosen)
        # Not the task: no code is loaded because a file says so.
        left_out = {"task", "storage_path", "name", *_NOT_OF_THE_RUN}
        entries = config.model_dump(mode="json", exclude=left_out)
        of_task = "" if config.task == BUILT_IN else f" --task {config.task}"
        text = f"# mnistsum train{of_task} --config FILE trains the same again\n"
        text += yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        (self.request.folder / "config.yaml").write(text.encode())

    def publish(
        self, finished: "FinishedModel", seconds: float, say: Callable[[str], None]
    ) -> TrainResult:
        """Write the model, the report and, last, the manifest: then the run is finished.

        `seconds` is how long the job has taken.
        """
        from mnistsum_ray.model.folder import write_model
        from mnistsum_ray.reporting.console import describe_metrics
        from mnistsum_ray.reporting.report import REPORT, how_to_score, write_report

        folder, description = self.request.folder, finished.description
        self.history = history = finished.history
        write_model(folder / "model", finished.weights, description)
        self._write_config(finished.precision)
        self._write_history()
        # The first epoch includes one-time work such as loading kernels.
        steady = history[1:] or history
        speeds = [line["rows_per_second"] for line in steady]
        result = TrainResult(
            run=folder.display,
            model=(folder / "model").display,
            parameters=description["parameters"],
            data=SplitRows(**self.manifest["data"]),  # drops other keys
            test=HeldOutMetrics(**description["test"]),
            images_per_second=round(fmean(speeds, [line["seconds"] for line in steady]), 1),
            seconds=round(seconds, 1),
        )
        training = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
        manifest = self.manifest | {
            "status": "finished",
            "metrics": result.line(),
            "training_seconds": round(training, 1),
            "precision": finished.precision,
            "hardware": finished.hardware,
            **finished.findings.manifest,
        }
        write_report(folder, manifest, description, history, finished.findings, say)
        if finished.findings.notice:
            say(finished.findings.notice)
        say(f"test: {describe_metrics(description['test'])}")
        say(f"report: {(folder / REPORT).display}")
        command = how_to_score(shell_command("score"), self.request.config.task, folder.display)
        say(f"score with it: {command}")
        self.manifest = manifest  # before the write, which may be done when a signal comes
        (folder / MANIFEST).write(manifest)
        return result
