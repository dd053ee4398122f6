"""The plan of a run: the input files with their footers, and the parts that are made of them."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import RunError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.progress import Progress
from mnistsum_ray.scoring.footers import read_all_footers
from mnistsum_ray.scoring.parts import split_into_parts
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.summary import name_failures
from mnistsum_ray.storage.listing import report_skipped


@dataclass(frozen=True)
class ScoringPlan:
    """Which rows of which input file become which output file."""

    files: pa.Table
    """`inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; `error` is set for each file that cannot be used."""
    parts: pa.Table
    """`parts.PART_SCHEMA`: the parts of all other files, in the order of the files."""

    def without(self, failures: dict[str, str]) -> "ScoringPlan":
        """Return the plan without the parts of some files. The files get the reasons in `failures` as their errors."""
        failed = pc.is_in(self.parts["name"], pa.array(failures, pa.string()))
        return ScoringPlan(_with_errors(self.files, failures), self.parts.filter(pc.invert(failed)))


def make_plan(run: ScoringRun, console: Console) -> ScoringPlan:
    """Plan a run: read the footers unless `preflight` has read them, and split the files into parts.

    Skipped and unusable files are named on the console.

    Raises:
        RequestError: none of the files has one of the columns.
        RunError: with `--strict`, some file cannot be used.
    """
    footers = run.footers
    if footers is None:
        progress = Progress(console.progress, "footers read", run.inputs.files.num_rows)
        footers = read_all_footers(run.inputs, run.columns, progress)
    files = run.inputs.files
    for name in footers.column_names:
        files = files.append_column(name, footers[name])
    parts, errors = split_into_parts(files, run.config.max_rows_per_file)
    files = _with_errors(files, errors | run.inputs.unusable)
    report_skipped(run.inputs.skipped, console.say)
    failures = files.filter(pc.is_valid(files["error"])).select(["name", "error"]).to_pylist()
    name_failures({row["name"]: row["error"] for row in failures}, console.say)
    if failures and run.config.strict:
        raise RunError(f"--strict: nothing was scored: {len(failures):,} files cannot be used, see above")
    return ScoringPlan(files, parts)


def _with_errors(files: pa.Table, errors: dict[str, str]) -> pa.Table:
    if not errors:
        return files
    reasons = [errors.get(name, old) for name, old in zip(files["name"].to_pylist(), files["error"].to_pylist(), strict=True)]
    return files.set_column(files.column_names.index("error"), "error", pa.array(reasons, pa.string()))
