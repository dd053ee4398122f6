"""Result of a scoring run: its totals, the table of files, the report and the manifest."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import RunError, counted, percent
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import Console, accuracies
from mnistsum_ray.reporting.report import REPORT, scored_page, versions
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.scoring.output import FILES_TABLE, RUN_FORMAT, RowCounts
from mnistsum_ray.scoring.parts import PREDICTIONS
from mnistsum_ray.scoring.request import Request

FILES_TABLE_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),  # null if the footer cannot be read
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "failed": pa.int64(),  # all rows of a file that failed, else 0
        "status": pa.string(),  # `scored` or `failed`
        "reason": pa.string(),  # why the file failed
    }
)
"""`files.parquet`: one row per input file; rows == scored + rejected + failed."""


@dataclass(frozen=True)
class Outcome:
    """What a run has found out."""

    request: Request
    failures: dict[str, str]
    """Input files that cannot be used: name and reason."""
    counts: RowCounts
    """Over the rows of all other files that are scored."""
    gone: int
    """Output files of input that is not there now."""
    resumed_rows: int
    """Rows that earlier runs had scored."""
    seconds: float
    """From the first report of a worker to the last one."""

    def totals(self) -> dict[str, Any]:
        """The fields of the job's last line, but for `seconds`."""
        files = self.request.files
        failed = sum(file.rows or 0 for file in files if file.name in self.failures)
        rejected = self.counts.bad.total
        new_rows = self.counts.rows - self.resumed_rows
        totals: dict[str, Any] = {
            "output": self.request.output.display,
            "input_rows": self.counts.rows + failed,
            "scored_rows": self.counts.rows - rejected,
            "rejected_rows": rejected,
            "failed_rows": failed,
            "resumed_rows": self.resumed_rows,
            "files": len(files),
            "failed_files": len(self.failures),
            "rows_per_second": round(new_rows / self.seconds, 1) if self.seconds else 0.0,
        }
        if self.request.config.label_column:
            known = self.counts.labelled
            for head in HEADS:
                accuracy = self.counts.right[head.name] / known if known else None
                totals[f"{head.name}_accuracy"] = accuracy
        return totals


def publish(outcome: Outcome, started: float, console: Console) -> ScoreResult:
    """Write the files about the run, and the manifest last; `started` is of `time.monotonic`.

    RunError: with `--strict` something cannot be used. There is no manifest then.
    """
    counts, output = outcome.counts, outcome.request.output
    totals = outcome.totals() | {"seconds": round(time.monotonic() - started, 1)}
    manifest = _manifest(outcome, totals)
    (output / FILES_TABLE).write(to_parquet(_files_table(outcome)))
    (output / REPORT).write(scored_page(manifest, counts.bad).encode())
    _say_result(outcome, totals, console.say)
    if outcome.request.config.strict and (counts.bad.total or outcome.failures):
        (output / MANIFEST).delete()  # one of a run without --strict
        rows = counted(counts.bad.total, "row")
        files = counted(len(outcome.failures), "file")
        why = f"so there is no {MANIFEST}; {REPORT} and {FILES_TABLE} say why"
        raise RunError(f"--strict: {rows} and {files} cannot be used, {why}")
    (output / MANIFEST).write(manifest)
    return ScoreResult(**totals)


def _files_table(outcome: Outcome) -> pa.Table:
    rows = []
    for file in outcome.request.files:
        rejected = outcome.counts.rejected[file.name]
        row: dict[str, Any] = {"file": file.name, "rows": file.rows, "rejected": rejected}
        if file.name in outcome.failures:
            row |= {"scored": 0, "failed": file.rows, "status": "failed"}
            row["reason"] = outcome.failures[file.name]
        else:
            row |= {"scored": (file.rows or 0) - rejected, "failed": 0, "status": "scored"}
        rows.append(row)
    return pa.Table.from_pylist(rows, FILES_TABLE_SCHEMA)


def _manifest(outcome: Outcome, totals: dict[str, Any]) -> dict[str, Any]:
    counts, request = outcome.counts, outcome.request
    config = request.config.model_dump(mode="json")
    locations = {"model": request.model, "input": request.root, "output": request.output}
    config |= {name: location.display for name, location in locations.items()}
    return {
        "format": RUN_FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": totals,
        "consistent_rows": counts.consistent,
        "labelled_rows": counts.labelled if request.config.label_column else None,
        "rejected_by_reason": counts.bad.reasons,
        "config": config,
        "model": {key: request.description[key] for key in ("sha256", "epoch", "parameters")},
        "precision": request.precision,
        "files_of_earlier_input": outcome.gone,
        "versions": versions(),
    }


def _say_result(outcome: Outcome, totals: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say the result in words."""
    counts = outcome.counts
    rows, files = counted(totals["input_rows"], "row"), counted(totals["files"], "file")
    say(f"scored {totals['scored_rows']:,} of {rows} in {files}, each exactly once")
    if totals["failed_files"]:
        failed = counted(totals["failed_files"], "file")
        known = counted(totals["failed_rows"], "known row")
        say(f"{failed} with {known} could not be used: {FILES_TABLE} says why")
    if totals["rejected_rows"]:
        rejected = counted(totals["rejected_rows"], "row")
        say(f"{rejected} rejected, null in the output: {counts.bad.describe()}")
    if totals["scored_rows"]:
        consistent = percent(counts.consistent / totals["scored_rows"])
        say(f"sum = digit + number in {consistent} of the rows")
    if counts.labelled:
        say(f"right: {accuracies(totals)} ({counted(counts.labelled, 'labelled row')})")
    say(f"predictions: {totals['output']}/{PREDICTIONS}; report: {totals['output']}/{REPORT}")
