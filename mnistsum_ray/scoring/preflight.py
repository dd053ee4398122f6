"""The checked request and the plan of a scoring run: footers of the input files, what is wrong with them, and their parts."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import image_type_error, number_type_error
from mnistsum_ray.data.inputs import FILE_SCHEMA, Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import Footer, column_error, read_footer
from mnistsum_ray.errors import RequestError, RunError, StorageError, UnusableFileError
from mnistsum_ray.model.heads import PREDICTION_FIELDS, PROBABILITY_FIELDS
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.scoring.parts import map_files, split_into_parts
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder, refused

FOOTER_SCHEMA: Final = pa.schema(
    [
        *FILE_SCHEMA,
        ("rows", pa.int64()),
        ("longest_group", pa.int64()),  # rows of its longest row group
        ("bytes", pa.int64()),  # of all columns, decompressed
        ("footer_sha256", pa.string()),
        ("recast", pa.list_(pa.string())),  # columns whose type changes
        ("error", pa.string()),  # why the file cannot be scored
    ]
)
"""One row per input file. A file whose footer cannot be read has an error and otherwise nulls."""

_MAX_FILES: Final = 1000
"""Unusable files that the console names; files.parquet has all."""


@dataclass(frozen=True)
class Request:
    """A checked request: the model, the input files, and the output folder."""

    config: ScoreConfig
    model: Location
    card: dict[str, Any]
    """Contents of the model's `model.json`."""
    weights: dict[str, npt.NDArray[Any]]
    inputs: Inputs
    output: Location
    files: pa.Table
    """FOOTER_SCHEMA; `error` is set for each file that cannot be used."""


@dataclass(frozen=True)
class Plan(Request):
    """Everything about a run: the request, how it is scored, and which rows of which input file become which output file."""

    parts: pa.Table
    """`parts.PART_SCHEMA`: the parts of all other files, in the order of the files."""
    precision: str
    held: OutputFolder
    """The output folder, which this run holds."""

    def source(self, name: str) -> str:
        """An input file in full: a path, or a URI without its query."""
        return self.inputs.root.at(f"{self.inputs.root.path}/{name}").display

    @property
    def spec(self) -> dict[str, Any]:
        """The model and settings that determine the predictions, as JSON has them. One output holds predictions of one spec."""
        return {
            "--model with SHA-256": self.card["sha256"],
            "--precision": self.precision,
            "--image-column": self.config.image_column,
            "--number-column": self.config.number_column,
            "--label-column": self.config.label_column,
            "--probabilities": self.config.probabilities,
        }

    @property
    def failures(self) -> dict[str, str]:
        """The files that cannot be used: name and reason."""
        failed = self.files.filter(pc.is_valid(self.files["error"]))
        return dict(zip(failed["name"].to_pylist(), failed["error"].to_pylist(), strict=True))

    def without(self, failures: dict[str, str]) -> "Plan":
        """Return the plan without the parts of some files. The files get the reasons in `failures` as their errors."""
        if not failures:
            return self
        names, reasons = (pa.array(values, pa.string()) for values in (failures.keys(), failures.values()))
        errors = pc.coalesce(reasons.take(pc.index_in(self.files["name"], names)), self.files["error"])
        files = self.files.set_column(self.files.column_names.index("error"), "error", errors)
        return replace(self, files=files, parts=self.parts.filter(pc.invert(pc.is_in(self.parts["name"], names))))


def preflight(config: ScoreConfig, console: Console) -> Request:
    """Check everything that can be checked without a cluster.

    Raises:
        RequestError: the model, the input or the output cannot be used; none of the files has one of the columns.
        RunError: the storage does not give an input file.
    """
    output = _locate_output(config.output)
    inputs = list_inputs(config.input, output)
    try:
        files = read_footers(inputs, config, console)
    except StorageError as error:
        raise RunError(f"--input {error}; nothing was begun") from None
    model = locate_existing(config.model, "--model")
    from mnistsum_ray.model.folder import copy_weights, load_model  # imports PyTorch, after the quick checks

    try:
        network, card = load_model(model)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    weights = {name: value.numpy() for name, value in copy_weights(network).items()}
    return Request(config, model, card, weights, inputs, output, files)


def _locate_output(text: str) -> Location:
    output = locate(text, "--output", output_base_folder())
    with refused("--output"):
        found = output.status()
    if found and not found.is_folder:
        raise RequestError(f"--output {output.display}: is a file; name a folder")
    # `at` also removes the query of a URI from the display.
    return output.at(os.path.realpath(output.path) if output.is_local else output.path)


def make_plan(request: Request, precision: str, held: OutputFolder, console: Console) -> Plan:
    """Plan a run: split the files into parts."""
    parts, errors = split_into_parts(request.files, request.config.max_rows_per_file)
    report_skipped(request.inputs.skipped, console.say)
    if recast := sorted(set(pc.list_flatten(request.files["recast"]).to_pylist())):
        console.say(
            f"columns whose type changes in the output: {', '.join(recast)}; "
            "INT96 becomes a timestamp in microseconds, any other what it is stored as"
        )
    checked = vars(request) | {"output": held.place}
    return Plan(**checked, parts=parts, precision=precision, held=held).without(errors)


def say_failures(failures: dict[str, str], say: Callable[[str], None]) -> None:
    """Name the files that cannot be used, one line each with the reason."""
    for name in list(failures)[:_MAX_FILES]:
        say(f"cannot be used: {name}: {failures[name]}")


def read_footers(inputs: Inputs, config: ScoreConfig, console: Console) -> pa.Table:
    """Read the footers of all input files, as FOOTER_SCHEMA in the same order.

    Raises:
        RequestError: none of the files has one of the columns.
        StorageError: the storage does not give a file.
    """
    progress = Progress(console.progress, "footers read", inputs.files.num_rows)
    found = map_files(partial(_read_footer, inputs, config), inputs.root, inputs.files, progress)
    files = pa.concat_tables([pa.Table.from_pylist(rows, FOOTER_SCHEMA) for rows in found])
    # A column that no readable file has is a wrong flag rather than a wrong file.
    readable = files.filter(pc.is_valid(files["rows"]))
    for flag, column in _columns(config).items():
        lack = pc.fill_null(pc.starts_with(readable["error"], f"has no column {column!r}"), False)
        if readable.num_rows and pc.all(lack).as_py():
            name, error = readable["name"][0], readable["error"][0].as_py().partition(";")[0]
            raise RequestError(f"{flag} {column}: no file of --input has such a column; {name} {error}")
    return files


def _read_footer(inputs: Inputs, config: ScoreConfig, file: dict[str, Any]) -> dict[str, Any]:
    """What FOOTER_SCHEMA says of a file, of which `file` has the fields of `inputs.FILE_SCHEMA`."""
    name = file["name"]
    if name in inputs.unusable:
        return file | {"error": inputs.unusable[name]}
    try:
        footer = read_footer(inputs.root / name, file["size"])
    except UnusableFileError as error:
        return file | {"error": str(error)}
    image = f"{config.image_column}."
    recast = [f"{path} ({kind})" for path, kind in footer.recast.items() if not f"{path}.".startswith(image)]
    return file | {
        "rows": sum(footer.group_rows),
        "longest_group": max(footer.group_rows, default=0),
        "bytes": footer.decompressed_bytes,
        "footer_sha256": footer.sha256,
        "recast": recast,
        "error": _file_error(footer, config),
    }


def _columns(config: ScoreConfig) -> dict[str, str]:
    """The columns that scoring reads, by the flag that names each."""
    columns = {"--image-column": config.image_column, "--number-column": config.number_column}
    return columns | ({"--label-column": config.label_column} if config.label_column else {})


def _file_error(footer: Footer, config: ScoreConfig) -> str | None:
    """Return why a file with this footer cannot be scored, or None if it can."""
    names = footer.schema.names
    type_errors = {"--image-column": image_type_error, "--number-column": number_type_error}
    for flag, name in _columns(config).items():
        if name not in names:
            some = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            return f"has no column {name!r} but {some}; {flag} names another"
        error = column_error(footer.schema, name, type_errors.get(flag, lambda _: None))
        if error:
            return f"{error}, or {flag} names another"
    # DuckDB and Spark do not tell upper case from lower case.
    added = [*PREDICTION_FIELDS.names, *(PROBABILITY_FIELDS.names if config.probabilities else ())]
    if taken := next((name for name in names if name.lower() in added), None):
        return f"has a column {taken!r}, which scoring would add; rename it"
    return None
