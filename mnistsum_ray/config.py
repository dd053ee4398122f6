"""Frozen configs of the jobs. A YAML file and the command line fill them; the command line wins.

The text below a field is its help; brackets in it hold the value of an unset field.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, get_args

import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)

from mnistsum_ray.data.columns.base import Column, find_columns
from mnistsum_ray.errors import RequestError, did_you_mean, shortened, spelled
from mnistsum_ray.storage.uri import SECRETS_REFUSED, hide_secrets, may_hold_secrets
from mnistsum_ray.task import BUILT_IN, Task
from mnistsum_ray.task_loader import load_task, task_name

Place: TypeAlias = str | os.PathLike[str]
"""A path or URI as a program gives it: the field is its text."""


class JobConfig(BaseModel):
    """Base of all configs. RequestError: fields are wrong; its line names the flag of each."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,  # `name: 7` in YAML
        hide_input_in_errors=True,  # messages would quote the values, and so secrets
    )

    if not TYPE_CHECKING:  # type checkers and editors then see the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise RequestError(explain_fields(error, type(self))) from error

    @field_validator("*", mode="before")
    @classmethod
    def _check_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Make texts of paths; refuse those that hold secrets, and true and false as 1 and 0."""
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = (kind, *get_args(kind))
        if isinstance(value, bool) and (int in kinds or float in kinds) and bool not in kinds:
            raise ValueError(f"must be a number, not {spelled(value)}")
        is_list = isinstance(value, list | tuple)
        values = value if is_list else [value]
        texts = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in values]
        if any(isinstance(text, str) and may_hold_secrets(text) for text in texts):
            raise ValueError(SECRETS_REFUSED)
        return texts if is_list else texts[0]


def flag_name(field: str) -> str:
    """Return the flag of a field, by which messages name it."""
    return f"--{field.replace('_', '-')}"


def explain_fields(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return one line on all fields that are wrong or missing."""
    problems: dict[str, str] = {}
    for found in error.errors():
        field = str(found["loc"][0])
        problem = found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            problem = "required"
        elif found["type"] == "extra_forbidden":
            problem = f"there is no such setting{did_you_mean(field, kind.model_fields)}"
        elif found["type"] != "value_error":  # pydantic's own; this package's say enough
            got = shortened(spelled(found["input"]))
            problem = f"{problem[:1].lower()}{problem[1:]}, got {got!r}"
        # Where a type is a union, each of its types has a problem: the first says enough.
        problems.setdefault(shortened(hide_secrets(flag_name(field))), problem)
    return "; ".join(f"{flag}: {problem}" for flag, problem in problems.items())


class TaskConfig(JobConfig):
    """Base of the configs of a job that has a task.

    Made with a task, a config is of a subclass that also has the task's columns and settings as
    fields: `TrainConfig(task=Shapes, dropout=0.2)`.
    """

    task_class: ClassVar[type[Task]]
    column_fields: ClassVar[dict[str, str]] = {}
    """Fields for the names of columns, by the columns' names in the task."""
    setting_fields: ClassVar[tuple[str, ...]] = ()

    task: str = BUILT_IN
    """your own task: file.py:Class or module:Class"""

    def __new__(cls, **fields: Any) -> Self:
        """Make the config of the task's own class."""
        return object.__new__(cls.of_task(fields.get("task")))

    @classmethod
    def of_task(cls, named: Any) -> type[Self]:
        """Return the class of configs for a task (a class, or its name), or raise RequestError.

        This is where a task's code is loaded.
        """
        if "task_class" in cls.__dict__:  # a class that this method has made
            return cls
        task: Any = load_task(BUILT_IN if named is None else named)
        made: type[Self] = _config_class(cls, task)
        return made

    @field_validator("task", mode="before")
    @classmethod
    def _name_task(cls, value: Any) -> str:
        return task_name(cls.task_class)

    @classmethod
    def columns_of(cls, task: type[Task]) -> dict[str, tuple[Column, str]]:
        """Return the task's columns that this job reads, each with what an unset flag means."""
        raise NotImplementedError

    @classmethod
    def fields_of(cls, task: type[Task]) -> dict[str, Any]:
        """Return more fields of this job that depend on the task: their types and defaults."""
        return {}

    @property
    def columns(self) -> dict[str, str | None]:
        """By the name of a column in the task its name in files; None if it is unset."""
        return {key: getattr(self, field) for key, field in self.column_fields.items()}

    @classmethod
    def flag_of(cls, key: str) -> str:
        """Return the flag for the name of a task's column."""
        return flag_name(cls.column_fields[key])

    def find_columns(self, columns: Mapping[str, Column], schema: pa.Schema) -> dict[str, str]:
        """Return which column of a file is read for which of `columns`; see `find_columns`."""
        return find_columns(columns, schema, self.columns, self.flag_of)


@cache
def _config_class(kind: Any, task: Any) -> Any:
    """Return the subclass of a config with the columns and settings of a task as fields."""
    columns: dict[str, Any] = {}
    column_fields: dict[str, str] = {}
    for key, (column, unset) in kind.columns_of(task).items():
        column_fields[key] = column.flag or f"{key}_column"
        text = f"column of the {key}: {column.form} [{unset}]"
        field = Field(default=None, min_length=1, description=text)
        columns[column_fields[key]] = (str | None, field)
    settings = task.Settings.model_fields if kind is TrainConfig else {}
    for name in [*columns, *settings]:
        if name in kind.model_fields or (name in columns and name in settings):
            clash = f"two flags are {flag_name(name)}; rename one"
            raise RequestError(f"--task {task_name(task)}: {clash}")
    fields: dict[str, Any] = {}
    for name, field in settings.items():
        fields[name] = (field.annotation, field)
    fields |= columns | kind.fields_of(task)
    made = create_model(kind.__name__, __base__=kind, __module__=kind.__module__, **fields)
    made.task_class, made.column_fields = task, column_fields
    made.setting_fields = tuple(settings)
    return made


class TrainConfig(TaskConfig):
    """Config of a training run. Unset fields follow from the task, the data and the cluster."""

    data: str | None = None
    """Parquet: folder, file or URI [that of the resumed run]"""
    skip_bad_rows: bool = False
    """train without the rows that cannot be used, and count them"""
    max_rows: int | None = Field(default=None, ge=1)
    """use only about this many rows per split, for a quick test [all]"""
    cache: bool | Literal["auto"] = "auto"
    """keep decoded training rows in memory; auto: if they fit"""
    init_from: str | None = None
    """start with the weights of this run or model folder [new weights]"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the forward pass [bf16 where it is faster, else fp32]"""
    epochs: int | None = Field(default=None, ge=1, le=1000)
    """passes over the training rows [the task's]"""
    # A layer may make 50,000 values of a row, and kernels of GPUs count to 2^31.
    batch_size: int | None = Field(default=None, ge=1, le=32_768)
    """rows per step, over all workers [the task's]"""
    learning_rate: float | None = Field(default=None, gt=0, lt=1e6)
    """maximum learning rate [the task's]"""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """decoupled weight decay"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of everything random: initial weights, order, augmentation"""
    num_workers: int | tuple[int, int] | None = None
    """workers: N, or MIN,MAX to be elastic [one, or one per GPU]"""
    use_gpu: bool | None = None
    """train on GPUs [true if the cluster has any]"""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPUs and threads per worker [all free CPUs of a node]"""
    max_failures: int = Field(default=3, ge=0, le=1000)
    """worker failures to recover from; drained nodes do not count"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for a busy or autoscaling cluster"""
    storage_path: str = "runs"
    """folder or URI of all runs; every node must reach it"""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """name of the run and its folder [a new unique name]"""
    resume: bool | Literal["auto"] = False
    """resume run --name from its last checkpoint; auto: start it if new"""

    if TYPE_CHECKING:  # a task's settings are fields, too

        def __init__(
            self,
            *,
            task: type[Task] | str = ...,
            data: Place | None = ...,
            init_from: Place | None = ...,
            storage_path: Place = ...,
            **fields: Any,
        ) -> None: ...

    @classmethod
    def columns_of(cls, task: type[Task]) -> dict[str, tuple[Column, str]]:
        read = {key: column for key, column in task.inputs.items() if key not in task.augmented}
        columns = {**read, **task.labels}
        return {key: (column, _usual(key, column)) for key, column in columns.items()}

    @classmethod
    def fields_of(cls, task: type[Task]) -> dict[str, Any]:
        if not task.data_names:
            return {}
        text = f"Parquet (folder, file or URI), or {', '.join(task.data_names)}"
        return {"data": (str, Field(default=next(iter(task.data_names)), description=text))}

    @property
    def settings(self) -> Any:
        """The task's settings. RequestError: they are wrong together."""
        given = {name: getattr(self, name) for name in self.setting_fields}
        try:
            return self.task_class.Settings(**given)
        except ValidationError as error:
            raise RequestError(explain_fields(error, self.task_class.Settings)) from error

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _parse_range(cls, value: Any, convert: Any) -> Any:
        is_range = isinstance(value, str) and "," in value
        workers = convert(value.split(",") if is_range else value)
        low, high = workers if isinstance(workers, tuple) else (workers, workers)
        if workers is not None and not 1 <= low <= high:
            raise ValueError("must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX")
        return workers

    @field_validator("resume")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("name", "") is None:  # an invalid name is missing there
            raise ValueError("needs --name, the run to continue")
        return value


@dataclass(frozen=True)
class Hyperparameters:
    """What the trained weights depend on, besides the task, its settings and the data."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    precision: str | None  # None: bf16 if it is faster on all workers, else fp32


class ScoreConfig(TaskConfig):
    """Config of a scoring run. Unset fields follow from the cluster."""

    input: tuple[str, ...] = Field(min_length=1)
    """Parquet to score: files, folders, URIs or local globs"""
    model: str
    """folder or URI of a training run, or of its model folder"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the forward pass [the model's, or fp32 on older CPUs]"""
    # Far below 2^31 values, where kernels of GPUs end: a layer may make 50,000 of a row.
    batch_size: int | None = Field(default=None, ge=1, le=16_384)
    """rows per forward pass [256 on CPUs, 2048 on GPUs]"""
    probabilities: bool = False
    """also write the task's lists, such as all class probabilities"""
    output: str
    """folder or URI for the predictions"""
    strict: bool = False
    """fail if any file or row is rejected"""
    overwrite: bool = False
    """delete an earlier output first, and score everything again"""
    # Arrow's limit of 2^31 bytes is 2 million rows of a KiB.
    max_rows_per_file: int | None = Field(default=None, ge=1, le=2_000_000)
    """maximum rows of an output file [a quarter of its input, 8 to 32 MiB]"""
    num_workers: int | None = Field(default=None, ge=1)
    """maximum number of workers [one per CPU, or four per GPU]"""
    use_gpu: bool | None = None
    """score on GPUs [true if the cluster has any]"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for a busy or autoscaling cluster"""

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | os.PathLike) else value

    if TYPE_CHECKING:  # a task's columns are fields, too

        def __init__(
            self,
            *,
            model: Place,
            input: Place | Sequence[Place],  # noqa: A002 - as the flag is called
            output: Place,
            task: type[Task] | str = ...,
            **fields: Any,
        ) -> None: ...

    @classmethod
    def columns_of(cls, task: type[Task]) -> dict[str, tuple[Column, str]]:
        inputs = {key: (column, _usual(key, column)) for key, column in task.inputs.items()}
        unread = "not used; set it to measure accuracy"
        return inputs | {key: (column, unread) for key, column in task.labels.items()}


def _usual(key: str, column: Column) -> str:
    return " or ".join(column.names or (key,))
