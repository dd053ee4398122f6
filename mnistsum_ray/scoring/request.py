"""The checked request of a scoring run: model, input files with their footers, output folder."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.columns.base import Column, ColumnError, rows_in
from mnistsum_ray.data.inputs import Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import read_footer, real_schema
from mnistsum_ray.errors import MissingFileError, RequestError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.storage.store import Entry, Location, in_threads, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing, output_base_folder
from mnistsum_ray.task import Task
from mnistsum_ray.task_loader import code_of


class InputFile(NamedTuple):
    """An input file as it was when the run began; its name is relative to the input's root."""

    name: str
    entry: Entry
    rows: int | None = None  # None: its footer cannot be read
    error: str | None = None  # why it cannot be scored
    int96: tuple[str, ...] = ()  # columns of this type: the output has another
    groups: tuple[int, ...] = ()  # the first row of each row group


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request."""

    config: ScoreConfig
    task: Task  # with the settings of the model
    metric_names: tuple[str, ...]  # of `row_metrics`
    description: dict[str, Any]  # contents of the model's `model.json`
    weights: dict[str, Any]  # tensors by their names
    root: Location  # the deepest folder that holds all input files
    output: Location
    files: list[InputFile] = field(default_factory=list)
    run_id: str = ""  # of run.json in the output; empty until the run has begun there

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the output, by flag, as run.json keeps it: another request is refused."""
        config = self.config
        return {
            "--task": self.task.name,
            "--model with SHA-256": self.description["sha256"],
            "--input in": self.root.display,
            "--precision": config.precision,
            **{config.flag_of(key): given for key, given in config.columns.items()},
            "--probabilities": config.probabilities,
            "--max-rows-per-file": config.max_rows_per_file,
        }

    @property
    def labels(self) -> dict[str, Column]:
        """The task's labels, where flags name their columns, else none."""
        given = self.config.columns
        return {key: column for key, column in self.task.labels.items() if given[key] is not None}

    @property
    def columns(self) -> dict[str, Column]:
        """What is read of each file: the task's inputs, and `labels`."""
        return {**self.task.inputs, **self.labels}

    def names_in(self, schema: pa.Schema) -> dict[str, str]:
        """Return the names of `columns` in a file, or raise ColumnError."""
        return self.config.find_columns(self.columns, schema)

    def pictures_in(self, schema: pa.Schema) -> list[str]:
        """Return a file's columns that the output does not have."""
        names = self.names_in(schema)
        return [name for key, name in names.items() if not self.columns[key].is_passed_on]

    def rows_in(self, size: int) -> int:
        """Return how many decoded rows take this many bytes."""
        return rows_in(size, self.task.inputs.values())


def check_request(config: ScoreConfig, console: Console) -> ScoreRequest:
    """Check everything that can be checked without a cluster."""
    _check_flags(config)
    output = locate(config.output, "--output", output_base_folder())
    inputs = list_inputs(config.input, output)
    report_skipped(inputs.skipped, console.say)
    model = locate_existing(config.model, "--model")
    # Importing torch takes seconds, and a wrong flag should not wait for that.
    from mnistsum_ray.model.folder import copy_weights, load_model
    from mnistsum_ray.model.trial import try_task

    try:
        task, network, description = load_model(model, config.task_class)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    if description["task"]["code"] != code_of(config.task_class):
        console.say(f"--task {config.task}: its code has changed since the model was trained")
    metric_names = try_task(task, network)
    # As the manifest names both.
    config = config.model_copy(update={"model": model.display, "output": output.display})
    weights = copy_weights(network)
    request = ScoreRequest(config, task, metric_names, description, weights, inputs.root, output)
    with as_request_error("--input"):
        return replace(request, files=_inspect_files(request, inputs, console))


def _check_flags(config: ScoreConfig) -> None:
    """Raise RequestError if flags do not go together with the task."""
    task = config.task_class
    if config.precision == "bf16" and not task.bf16:
        raise RequestError(f"--precision bf16: task {task.name} needs fp32, as its `bf16` says")
    unnamed = [config.flag_of(key) for key in task.labels if config.columns[key] is None]
    if 0 < len(unnamed) < len(task.labels):
        raise RequestError(f"{unnamed[0]}: metrics need all labels, so name this one too, or none")


def _inspect_files(request: ScoreRequest, inputs: Inputs, console: Console) -> list[InputFile]:
    """Read and check the footers of all input files.

    RequestError: no readable file can be scored, so a flag is wrong and not a file.
    """
    progress = Progress(console.progress, "footers read", len(inputs.files))
    inspect = partial(_inspect_file, request, inputs)
    files = list(in_threads(inputs.root, inspect, list(inputs.files), progress))
    readable = [file for file in files if file.rows is not None]
    if readable and all(file.error for file in readable):
        example = f"{readable[0].name} {readable[0].error}"
        raise RequestError(f"--input: no file can be scored, such as {example}")
    int96 = sorted({column for file in files for column in file.int96})
    if int96:
        columns = f"columns whose type changes in the output: {', '.join(int96)} (INT96)"
        console.say(f"{columns}; they become timestamps in microseconds")
    return files


def _inspect_file(request: ScoreRequest, inputs: Inputs, name: str) -> InputFile:
    """Return what the footer says of a file."""
    entry = inputs.files[name]
    try:
        if is_hidden(name):
            raise UnusableFileError("has a name that readers of Parquet skip; rename it")
        footer = read_footer(inputs.root / name, entry)
    except (UnusableFileError, MissingFileError) as error:  # a file may expire now
        return InputFile(name, entry, error=str(error))
    columns = map(footer.schema.column, range(len(footer.schema)))
    int96 = tuple(column.path for column in columns if column.physical_type == "INT96")
    problem = _schema_error(request, real_schema(footer.schema_arrow))
    rows = [footer.metadata.row_group(group).num_rows for group in range(footer.num_row_groups)]
    groups = tuple(accumulate(rows[:-1], initial=0))
    return InputFile(name, entry, footer.metadata.num_rows, problem, int96, groups)


def _schema_error(request: ScoreRequest, schema: pa.Schema) -> str | None:
    """Return why a file with these columns cannot be scored; None if it can."""
    from mnistsum_ray.model.inference import clashing_column

    try:
        pictures = request.pictures_in(schema)
    except ColumnError as error:
        return str(error)
    passed_on = [name for name in schema.names if name not in pictures]
    probabilities = request.config.probabilities
    clash = clashing_column(request.task, passed_on, probabilities=probabilities)
    return f"has a column {clash!r}, which scoring would add; rename it" if clash else None
