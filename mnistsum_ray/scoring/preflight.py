"""Checks of a scoring request that need no cluster, and the plan of its parts."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from mnistsum_ray.cluster.map_files import MAX_LOCAL_FILES
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import Inputs, list_inputs
from mnistsum_ray.errors import RequestError, RunError, StorageError, one_line
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.scoring.footers import Columns, read_all_footers
from mnistsum_ray.scoring.parts import split_into_parts
from mnistsum_ray.storage.listing import report_skipped
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder

if TYPE_CHECKING:
    from torch import Tensor

_MAX_FILES: Final = 1000
"""Unusable files that the console names."""


@dataclass(frozen=True)
class ScoringRun:
    """A checked request: the model, the input files, and the output folder."""

    config: ScoreConfig
    model: Location
    card: dict[str, Any]
    """Contents of the model's `model.json`."""
    weights: "dict[str, Tensor]"
    inputs: Inputs
    columns: Columns
    output: Location
    footers: pa.Table | None
    """`footers.FOOTER_SCHEMA`; None if there are so many files that the cluster has to read their footers."""

    def with_retries(self) -> "ScoringRun":
        """The same run, which retries for a while when the storage does not answer."""
        inputs = replace(self.inputs, root=self.inputs.root.with_retries())
        return replace(self, inputs=inputs, output=self.output.with_retries())


def preflight(config: ScoreConfig) -> ScoringRun:
    """Check everything that can be checked without a cluster.

    Raises:
        RequestError: the model, the input or the output cannot be used.
        RunError: the storage does not give an input file.
    """
    output = _locate_output(config.output)
    inputs = list_inputs(config.input, output)
    columns = Columns.from_config(config)
    try:
        footers = read_all_footers(inputs, columns) if inputs.files.num_rows <= MAX_LOCAL_FILES else None
    except StorageError as error:
        raise RunError(f"--input {error}; nothing was begun") from None
    model = locate_existing(config.model, "--model")

    # Importing torch takes a second, and a request whose files are wrong is refused without it.
    from mnistsum_ray.model.serialization import copy_weights, load_model

    try:
        network, card = load_model(model)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    if config.precision == "int8":
        _check_int8(card)
    return ScoringRun(config, model, card, copy_weights(network), inputs, columns, output, footers)


def _locate_output(text: str) -> Location:
    output = locate(text, "--output", output_base_folder())
    try:
        if output.info().type == pafs.FileType.File:
            raise RequestError(f"--output {output.display}: is a file; name a folder")
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    # `at` also removes the query of a URI from the display.
    return output.at(os.path.realpath(output.path) if output.is_local else output.path)


def _check_int8(card: dict[str, Any]) -> None:
    from mnistsum_ray.model.int8 import maxima_from_description, unavailable_reason

    if maxima_from_description(card) is None:
        raise RequestError(
            "--precision int8: the model holds no calibration for it, so it was trained by an older version or where PyTorch "
            "lacks integer convolutions; leave it out, or train again"
        )
    if unavailable_reason():
        raise RequestError("--precision int8: this PyTorch has no integer convolutions on this CPU; leave it out")


@dataclass(frozen=True)
class ScoringPlan:
    """Which rows of which input file become which output file."""

    files: pa.Table
    """`inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; `error` is set for each file that cannot be used."""
    parts: pa.Table
    """`parts.PART_SCHEMA`: the parts of all other files, in the order of the files."""

    @property
    def failures(self) -> dict[str, str]:
        """The files that cannot be used: name and reason."""
        failed = self.files.filter(pc.is_valid(self.files["error"]))
        return dict(zip(failed["name"].to_pylist(), failed["error"].to_pylist(), strict=True))

    def without(self, failures: dict[str, str]) -> "ScoringPlan":
        """Return the plan without the parts of some files. The files get the reasons in `failures` as their errors."""
        failed = pc.is_in(self.parts["name"], pa.array(failures, pa.string()))
        return ScoringPlan(_with_errors(self.files, failures), self.parts.filter(pc.invert(failed)))


def make_plan(run: ScoringRun, console: Console) -> ScoringPlan:
    """Plan a run: read the footers unless `preflight` has read them, and split the files into parts.

    Raises:
        RequestError: none of the files has one of the columns.
        RunError: with `--strict`, some file cannot be used.
        StorageError: the storage does not give an input file.
    """
    footers = run.footers
    if footers is None:
        progress = Progress(console.progress, "footers read", run.inputs.files.num_rows)
        footers = read_all_footers(run.inputs, run.columns, progress)
    files = run.inputs.files
    for name in footers.column_names:
        files = files.append_column(name, footers[name])
    parts, errors = split_into_parts(files, run.config.max_rows_per_file)
    plan = ScoringPlan(_with_errors(files, errors), parts)
    report_skipped(run.inputs.skipped, console.say)
    if run.config.strict and plan.failures:
        name_failures(plan.failures, console.say)
        raise RunError(f"--strict: nothing was scored: {len(plan.failures):,} files cannot be used, see above")
    return plan


def name_failures(failures: dict[str, str], say: Callable[[str], None]) -> None:
    """Name the files that cannot be used, one line each with the reason."""
    for name, reason in list(failures.items())[:_MAX_FILES]:
        say(f"cannot be used: {name}: {reason}")
    if len(failures) > _MAX_FILES:
        say(f"and {len(failures) - _MAX_FILES:,} more files; files.parquet will list all of them")


def _with_errors(files: pa.Table, errors: dict[str, str]) -> pa.Table:
    if not errors:
        return files
    reasons = [errors.get(name, old) for name, old in zip(files["name"].to_pylist(), files["error"].to_pylist(), strict=True)]
    return files.set_column(files.column_names.index("error"), "error", pa.array(reasons, pa.string()))
