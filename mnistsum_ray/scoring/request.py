"""The checked request of a scoring run: model, input files with their footers, output folder."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy.typing as npt

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import image_type_error, number_type_error
from mnistsum_ray.data.inputs import Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import column_error, read_footer
from mnistsum_ray.errors import RequestError, RunError, StorageError, UnusableFileError
from mnistsum_ray.model.heads import added_column
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing, output_base_folder


class InputFile(NamedTuple):
    """An input file as it was when the run began."""

    name: str
    """Relative to the input's root."""
    entry: Entry
    rows: int | None
    """None where its footer cannot be read."""
    recast: tuple[str, ...] = ()
    """Columns whose type changes in the output."""
    wrong_flag: str | None = None
    """The flag whose column it does not have, or has of a type that cannot be used."""
    error: str | None = None
    """Why it cannot be scored."""


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request."""

    config: ScoreConfig
    model: Location
    description: dict[str, Any]
    """Contents of the model's `model.json`."""
    weights: dict[str, npt.NDArray[Any]]
    root: Location
    """The deepest folder that holds all input files."""
    files: list[InputFile]
    output: Location
    precision: str | None
    """`bf16` or `fp32`; None until the workers are known."""
    run_id: str = ""
    """Of run.json in the output; empty until the run has begun there."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the output, by flag, as JSON has it. An output is of one request."""
        return {
            "--model with SHA-256": self.description["sha256"],
            "--input in": self.root.display,
            "--precision": self.precision,
            "--image-column": self.config.image_column,
            "--number-column": self.config.number_column,
            "--label-column": self.config.label_column,
            "--probabilities": self.config.probabilities,
            "--max-rows-per-file": self.config.max_rows_per_file,
        }


def check_request(config: ScoreConfig, console: Console) -> ScoreRequest:
    """Check everything that can be checked without a cluster.

    Raises:
        RequestError: the model, the input or the output cannot be used; in none of the files one of
            the columns can be used.
        RunError: the storage does not give an input file.
    """
    output = locate(config.output, "--output", output_base_folder())
    with as_request_error("--output"):
        if output.status():
            raise RequestError(f"--output {output.display}: is a file; name a folder")
    inputs = list_inputs(config.input, output)
    report_skipped(inputs.skipped, console.say)
    model = locate_existing(config.model, "--model")
    # Imports PyTorch, after the quick checks.
    from mnistsum_ray.model.folder import copy_weights, load_model

    try:
        network, description = load_model(model)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    weights = {name: value.numpy() for name, value in copy_weights(network).items()}
    try:
        files = _inspect_files(inputs, config, console)
    except StorageError as error:
        raise RunError(f"--input {error}; nothing was begun") from None
    return ScoreRequest(
        config, model, description, weights, inputs.root, files, output, config.precision
    )


def _inspect_files(inputs: Inputs, config: ScoreConfig, console: Console) -> list[InputFile]:
    """Read and check the footers of all input files.

    Raises:
        RequestError: in none of the files one of the columns can be used.
        StorageError: the storage does not give a file.
    """
    progress = Progress(console.progress, "footers read", len(inputs.files))
    inspect = partial(_inspect_file, inputs, config)
    files = list(in_threads(inputs.root, inspect, list(inputs.files), progress))
    # A column that no readable file can be scored by is a wrong flag rather than a wrong file.
    readable = [file for file in files if file.rows is not None]
    for flag, column in _columns(config).items():
        if readable and all(file.wrong_flag == flag for file in readable):
            example = f"{readable[0].name} {readable[0].error}"
            raise RequestError(f"{flag} {column}: is of use in no file of --input; {example}")
    recast = sorted({column for file in files for column in file.recast})
    if recast:
        said = f"columns whose type changes in the output: {', '.join(recast)}"
        console.say(f"{said}; they become timestamps in microseconds")
    return files


def _inspect_file(inputs: Inputs, config: ScoreConfig, name: str) -> InputFile:
    entry = inputs.files[name]
    unread = InputFile(name, entry, None)
    try:
        footer = read_footer(inputs.root / name, entry)
    except UnusableFileError as error:
        return unread._replace(error=str(error))
    columns = map(footer.schema.column, range(len(footer.schema)))
    recast = tuple(f"{of.path} (INT96)" for of in columns if of.physical_type == "INT96")
    read = unread._replace(rows=footer.metadata.num_rows, recast=recast)
    type_errors = {"--image-column": image_type_error, "--number-column": number_type_error}
    for flag, column in _columns(config).items():
        type_error = type_errors.get(flag, lambda _: None)
        problem = column_error(footer.schema_arrow, column, flag, type_error)
        if problem:
            return read._replace(wrong_flag=flag, error=problem)
    taken = added_column(footer.schema_arrow.names, config.probabilities)
    would_add = f"has a column {taken!r}, which scoring would add; rename it"
    return read._replace(error=would_add if taken else None)


def _columns(config: ScoreConfig) -> dict[str, str]:
    """The columns that scoring reads, by the flag that names each."""
    columns = {"--image-column": config.image_column, "--number-column": config.number_column}
    if config.label_column:
        columns["--label-column"] = config.label_column
    return columns
