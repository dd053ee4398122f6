"""The checked request of a training run.

Neither torch nor Ray, which take seconds, is imported for the check: a wrong request is refused at
once.
"""

import secrets
import shlex
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from typing import Any, Final

from mnistsum_ray.config import Hyperparameters, TrainConfig
from mnistsum_ray.data.sources import Source, StartProgress, open_source
from mnistsum_ray.errors import (
    MissingFileError,
    RequestError,
    one_line,
    shell_command,
    shortened,
    spelled,
)
from mnistsum_ray.reporting.results import MANIFEST
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import (
    as_request_error,
    check_ray_reaches,
    locate,
    locate_existing,
    output_base_folder,
)
from mnistsum_ray.task import BUILT_IN, Task
from mnistsum_ray.task_loader import code_of

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
            notice = _changed_task(config, stored)
            config = _resumed(config, stored_config)
        else:
            _check_free(folder, name, begun)
            if config.init_from and not locate(config.init_from, "--init-from").exists():
                raise RequestError(f"--init-from {config.init_from}: does not exist")
    task = config.task_class(config.settings)
    if config.data is None:
        raise RequestError("--data: required; a folder or URI of Parquet files")
    find = partial(config.find_columns, task.training_columns)
    source = open_source(task, config.data, find, start_progress).limited(config.max_rows)
    chosen = _task_defaults(task, config, source.train_rows)
    if chosen and not resume:
        flags = (f"--{key.replace('_', '-')} {spelled(value)}" for key, value in chosen.items())
        notice = f"using the defaults {' '.join(flags)}"
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
    """Return the task's defaults, or raise RequestError if it sets too few or unknown ones."""
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
        raise RequestError(f"task {task.name}: defaults has {unknown[0]!r}, which is not a setting")
    return {key: value for key, value in defaults.items() if getattr(config, key) is None}


def _changed_task(config: TrainConfig, stored: dict[str, Any]) -> str:
    """Return a line if the task's file is not that of the run, else an empty one."""
    if stored["task"]["code"] == code_of(config.task_class):
        return ""
    changed = f"the file of the task {config.task_class.name} has changed since the run began"
    return f"{changed}; the run continues, with metrics of both"


def _check_free(folder: Location, name: str, begun: bool) -> None:
    taken = f"--name {name}: {folder.display}"
    if begun:
        raise RequestError(f"{taken} exists; continue it with --resume, or choose another name")
    if folder.file_entry() or folder.visible_files():  # `_lock` and `.probe` are ours
        raise RequestError(f"{taken} has other files but no run; choose another name")


def _resumed(config: TrainConfig, stored_config: TrainConfig) -> TrainConfig:
    """Return the config of the run that is resumed, with the fields that are given now.

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
    """Return the manifest of a run, and its config.

    RequestError: there is none that can be read, or it is of another task than the given one.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = path.read_json()
        name, code = manifest["task"]["name"], manifest["task"]["code"]
        if not isinstance(code, str):
            raise TypeError("code")
        if name != given.task_class.name:
            other = f"is of the task {name}, and not {given.task_class.name}; add its --task"
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
