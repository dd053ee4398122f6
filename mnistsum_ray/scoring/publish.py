"""Result of a scoring run: its line, the pictures, the report and the manifest."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import RunError, counted, percent
from mnistsum_ray.reporting.console import Console, accuracies
from mnistsum_ray.reporting.report import REPORT, draw_pictures, scored_page, versions
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.output import (
    FILES_TABLE,
    MANIFEST,
    MANIFEST_FORMAT,
    OutputFiles,
    unpublish,
)
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.preflight import Plan

_FILES_IN_ERROR: Final = 5


def result_line(plan: Plan, files: pa.Table, counts: RowCounts, resumed_rows: int, scoring_seconds: float) -> dict[str, Any]:
    """The fields of the job's last line, but for `seconds`; `files` is `output.FILES_TABLE_SCHEMA`.

    The seconds are from the start of the first part to the end of the last one; 0 if none was scored.
    """
    names = ("rows", "scored", "rejected", "failed")
    rows, scored, rejected, failed = (pc.sum(files[name]).as_py() or 0 for name in names)
    new_rows = scored + rejected - resumed_rows
    return {
        "output": plan.output.display,
        "input_rows": rows,
        "scored_rows": scored,
        "rejected_rows": rejected,
        "failed_rows": failed,
        "resumed_rows": resumed_rows,
        "files": files.num_rows,
        "failed_files": len(plan.failures),
        "rows_per_second": round(new_rows / scoring_seconds, 1) if scoring_seconds else 0.0,
    } | (counts.accuracies() if plan.config.label_column else {})


def check_strict(plan: Plan, counts: RowCounts, line: dict[str, Any]) -> None:
    """With `--strict`, raise a RunError if a row or file cannot be used; there is no manifest then."""
    rejected, failed = line["rejected_rows"], line["failed_files"]
    if not plan.config.strict or not (rejected or failed):
        return
    unpublish(plan.held)  # one of an earlier run, too
    reasons = [f"{name}: {reason}" for name, reason in plan.failures.items()][:_FILES_IN_ERROR]
    if rejected:
        reasons.append(f"{counts.describe()}; all: {line['output']}/{REJECTED}")
    raise RunError(
        f"--strict: {counted(rejected, 'row')} and {counted(failed, 'file')} cannot be used, so there "
        f"is no {MANIFEST}; the same command without --strict finishes at once: {' | '.join(reasons)}"
    )


def publish(plan: Plan, output: OutputFiles, files: pa.Table, line: dict[str, Any], console: Console) -> None:
    """Write the files about the run, and the manifest last; `files` is `output.FILES_TABLE_SCHEMA`.

    Raises:
        ExistingFileError: another run has finished the output meanwhile.
        RunError: another run holds the output.
    """
    counts = output.counts
    labelled = {"confusion.png": (counts.confusion,), "reliability.png": (counts.probability_metrics(),)}
    drawn = draw_pictures(labelled if counts.labelled else {}, console.say)
    manifest = _make_manifest(plan, output, line)
    page = scored_page(manifest, counts, drawn)
    unpublish(plan.held)
    for name, data in {FILES_TABLE: to_parquet(files), REPORT: page.encode(), **drawn}.items():
        plan.held.write(name, data)
    plan.held.create(MANIFEST, manifest)


def _make_manifest(plan: Plan, output: OutputFiles, line: dict[str, Any]) -> dict[str, Any]:
    counts = output.counts
    # `at` removes the query of a URI, which may hold keys.
    places = {"model": plan.model, "input": plan.inputs.root, "output": plan.output}
    located = {name: place.at(place.path).display for name, place in places.items()}
    return {
        "format": MANIFEST_FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": line,
        "consistent_rows": counts.consistent,
        "labelled_rows": counts.labelled if plan.config.label_column else None,
        "rejected_by_reason": counts.reasons,
        "odd_years": counts.odd_years,
        "bad_labels": asdict(counts.bad_labels) if plan.config.label_column else None,
        "confusion": counts.confusion if counts.labelled else None,
        "probabilities": counts.probability_metrics(),
        "config": plan.config.model_dump(mode="json") | located,
        "model": {key: plan.card[key] for key in ("sha256", "epoch", "parameters")},
        "precision": plan.precision,
        "skipped_files": len(plan.inputs.skipped),
        "files_of_earlier_input": pc.sum(pc.invert(output.stamps["planned"])).as_py() or 0,
        "versions": versions(),
    }


def say_result(line: dict[str, Any], counts: RowCounts, say: Callable[[str], None]) -> None:
    """Say the result in words."""
    rows, files = counted(line["input_rows"], "row"), counted(line["files"], "file")
    say(f"scored {line['scored_rows']:,} of {rows} in {files}, each exactly once")
    if line["failed_files"]:
        failed, known = counted(line["failed_files"], "file"), counted(line["failed_rows"], "known row")
        say(f"{failed} with {known} could not be used: {line['output']}/{FILES_TABLE} says why")
    if line["rejected_rows"]:
        say(f"{counted(line['rejected_rows'], 'row')} rejected: {counts.describe()}; all: {line['output']}/{REJECTED}")
    if line["scored_rows"]:
        say(f"sum = digit + number in {percent(counts.consistent / line['scored_rows'])} of the rows")
    if counts.odd_years:
        say(f"{counted(counts.odd_years, 'INT96 timestamp')} of a year not in 1 to 9999, written as null")
    if bad := counts.bad_labels.total:
        say(f"{counted(bad, 'label')} outside 0..{DIGITS - 1}, counted as unknown: {counts.bad_labels.describe()}")
    if counts.labelled:
        say(f"right: {accuracies(line)} ({counted(counts.labelled, 'labelled row')})")
    say(f"predictions: {line['output']}/{PREDICTIONS}; report: {line['output']}/{REPORT}")
