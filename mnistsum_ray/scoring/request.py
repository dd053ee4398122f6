"""The checked request of a scoring run: model, input files with their footers, output folder."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import image_type_error, number_type_error
from mnistsum_ray.data.inputs import Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import column_error, read_footer
from mnistsum_ray.errors import MissingFileError, RequestError, UnusableFileError, counted
from mnistsum_ray.model.heads import clashing_column
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.storage.store import Entry, Location, in_threads, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing, output_base_folder

if TYPE_CHECKING:  # importing torch takes seconds, and a wrong flag should not wait for that
    from torch import Tensor


class InputFile(NamedTuple):
    """An input file as it was when the run began; its name is relative to the input's root."""

    name: str
    entry: Entry
    rows: int | None = None  # None: its footer cannot be read
    error: str | None = None  # why it cannot be scored
    int96: tuple[str, ...] = ()  # columns of this type: the output has another


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request."""

    config: ScoreConfig
    description: dict[str, Any]  # contents of the model's `model.json`
    weights: "dict[str, Tensor]"
    root: Location  # the deepest folder that holds all input files
    files: list[InputFile]
    output: Location
    run_id: str = ""  # of run.json in the output; empty until the run has begun there

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the output, by flag, as run.json keeps it: another request is refused."""
        config = self.config
        return {
            "--model with SHA-256": self.description["sha256"],
            "--input in": self.root.display,
            "--precision": config.precision,
            "--image-column": config.image_column,
            "--number-column": config.number_column,
            "--label-column": config.label_column,
            "--probabilities": config.probabilities,
            "--max-rows-per-file": config.max_rows_per_file,
        }


def check_request(config: ScoreConfig, console: Console) -> ScoreRequest:
    """Check everything that can be checked without a cluster."""
    output = locate(config.output, "--output", output_base_folder())
    with as_request_error("--output"):
        if output.file_entry():
            raise RequestError(f"--output {output.display}: is a file; name a folder")
    inputs = list_inputs(config.input, output)
    report_skipped(inputs.skipped, console.say)
    model = locate_existing(config.model, "--model")
    from mnistsum_ray.model.folder import copy_weights, load_model

    try:
        network, description = load_model(model)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    with as_request_error("--input"):
        files = _inspect_files(inputs, config, console)
    # As the manifest names both.
    config = config.model_copy(update={"model": model.display, "output": output.display})
    weights = copy_weights(network)
    return ScoreRequest(config, description, weights, inputs.root, files, output)


def _inspect_files(inputs: Inputs, config: ScoreConfig, console: Console) -> list[InputFile]:
    """Read and check the footers of all input files.

    RequestError: no readable file can be scored, so a flag is wrong and not a file.
    """
    progress = Progress(console.progress, "footers read", len(inputs.files))
    inspect = partial(_inspect_file, inputs, config)
    inspected = list(in_threads(inputs.root, inspect, list(inputs.files), progress))
    files = [file for file in inspected if file]
    if len(files) < len(inspected):
        missing = len(inspected) - len(files)
        console.say(f"left out: {counted(missing, 'file')} gone since the input was listed")
    readable = [file for file in files if file.rows is not None]
    if readable and all(file.error for file in readable):
        example = f"{readable[0].name} {readable[0].error}"
        raise RequestError(f"--input: no file can be scored, such as {example}")
    int96 = sorted({column for file in files for column in file.int96})
    if int96:
        said = f"columns whose type changes in the output: {', '.join(int96)} (INT96)"
        console.say(f"{said}; they become timestamps in microseconds")
    return files


def _inspect_file(inputs: Inputs, config: ScoreConfig, name: str) -> InputFile | None:
    """What the footer says of a file; None: it is gone since the input was listed."""
    entry = inputs.files[name]
    try:
        # A part's number is 15 bytes, and file systems take names of 255.
        if len(name.rpartition("/")[2].encode()) > 240:
            raise UnusableFileError("has too long a name, of more than 240 bytes; shorten it")
        if is_hidden(name):
            skipped = "readers of Parquet skip, as all names with . or _ in front"
            raise UnusableFileError(f"would get a name that {skipped}; rename it")
        footer = read_footer(inputs.root / name, entry)
    except MissingFileError:  # one file that expires now must not cost all others
        return None
    except UnusableFileError as error:
        return InputFile(name, entry, error=str(error))
    columns = map(footer.schema.column, range(len(footer.schema)))
    int96 = tuple(column.path for column in columns if column.physical_type == "INT96")
    problem = _schema_error(footer.schema_arrow, config)
    return InputFile(name, entry, footer.metadata.num_rows, problem, int96)


def _schema_error(schema: pa.Schema, config: ScoreConfig) -> str | None:
    """Why a file with these columns cannot be scored; None if it can."""
    columns: list[tuple[str, str | None, Any]] = [
        ("--image-column", config.image_column, image_type_error),
        ("--number-column", config.number_column, number_type_error),
        ("--label-column", config.label_column, lambda _: None),
    ]
    for flag, column, type_error in columns:
        problem = column and column_error(schema, column, flag, type_error)
        if problem:
            return problem
    passed_on = [name for name in schema.names if name != config.image_column]
    taken = clashing_column(passed_on, config.probabilities)
    return f"has a column {taken!r}, which scoring would add; rename it" if taken else None
