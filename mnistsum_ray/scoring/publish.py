"""Result of a scoring run: its line, the pictures, the report and the manifest, which are published with the staged files."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import ExistingFileError, RunError, counted, percent
from mnistsum_ray.reporting.console import accuracies
from mnistsum_ray.reporting.report import Picture, picture_files, scored_page, versions
from mnistsum_ray.scoring.counts import Counts
from mnistsum_ray.scoring.output import (
    FILES_TABLE,
    FORMAT,
    MANIFEST,
    PICTURES,
    REPORT,
    SUMMARIES,
    Committed,
    OutputFiles,
    unpublish,
)
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.preflight import STAGING, Plan

_MOVE_THREADS: Final = 16
"""An object store copies and deletes each file that is moved, so many moves run at the same time."""

_REASONS_ON_CONSOLE: Final = 10


def result_line(plan: Plan, files: pa.Table, counts: Counts, resumed_rows: int, scoring_seconds: float) -> dict[str, Any]:
    """Return the fields of the job's last line, but for `seconds`.

    `files` is a table of `output.FILES_SCHEMA`. The seconds are from the start of the first part to the end of the last one.
    """
    usable = pc.equal(files["status"], "scored")
    columns = (files["rows"].filter(usable), files["scored"], files["rejected"], pc.invert(usable))
    input_rows, scored, rejected, failed = (pc.sum(column).as_py() or 0 for column in columns)
    return {
        "output": plan.output.display,
        "input_rows": input_rows,
        "scored_rows": scored,
        "rejected_rows": rejected,
        "resumed_rows": resumed_rows,
        "files": files.num_rows,
        "failed_files": failed,
        "rows_per_second": round((scored + rejected - resumed_rows) / scoring_seconds, 1) if scoring_seconds else 0.0,
    } | (counts.accuracies() if plan.config.label_column else {})


def publish(
    plan: Plan, committed: Committed, staged: OutputFiles | None, files: pa.Table, counts: Counts, line: dict[str, Any]
) -> None:
    """Write the files about the run; where there is a staging folder, move all files of the run from it to the output.

    `--overwrite` replaces the files that the output held when the run began (`committed`).

    Raises:
        RunError: another run holds the output.
    """
    drawn = _draw_pictures(counts)
    manifest = _make_manifest(plan, committed.unplanned, counts, line)
    page = scored_page(manifest, counts, {PICTURES[name]: picture for name, picture in drawn.items()})
    summaries = {FILES_TABLE: to_parquet(files), REPORT: page.encode(), **picture_files(drawn)}
    for name in SUMMARIES:
        if name in summaries:
            plan.folder.write(name, summaries[name])
        else:
            plan.folder.delete(name)  # an earlier run may have drawn it
    if staged:
        replaced = committed.published.stamps["output"].to_pylist() if plan.config.overwrite else []
        publish_staged(plan, staged, list(summaries), replaced)
    plan.held.delete(MANIFEST)  # of a run that had nothing more to score
    try:
        plan.held.create(MANIFEST, manifest)
    except ExistingFileError as error:
        raise RunError(f"--output {error}: another run has finished it meanwhile; run the command again") from None
    if staged:
        plan.held.delete_folder(STAGING)


def publish_staged(plan: Plan, staged: OutputFiles, summaries: Iterable[str], replaced: Iterable[str]) -> None:
    """Move the parts and the `summaries` of the staging folder into the output, in an order that keeps every visible state valid.

    `replaced` are predictions that the output held when the run began. Those that are not written again are deleted. All other
    files stay. The manifest comes after this.

    Raises:
        RunError: another run holds the output.
    """
    # Rejected rows come before predictions, as they are committed.
    rejected = [f"{REJECTED}/{name}" for name in sorted(staged.rejected)]
    predictions = [f"{PREDICTIONS}/{name}" for name in staged.stamps["output"].to_pylist()]
    gone = {f"{folder}/{name}" for name in replaced for folder in (PREDICTIONS, REJECTED)} - {*rejected, *predictions}
    unpublish(plan.held)

    move = partial(plan.folder.move, target=plan.held)
    with ThreadPoolExecutor(_MOVE_THREADS) as pool:
        for step, names in ((move, rejected), (move, predictions), (plan.held.delete, gone), (move, summaries)):
            list(pool.map(step, names))


def _draw_pictures(counts: Counts) -> dict[str, Picture]:
    """By file name: probabilities; where rows have labels reliability and confusion; where rows were rejected the reasons."""
    from mnistsum_ray.reporting import pictures  # Matplotlib takes a second to import.

    drawn = {"probabilities.png": pictures.draw_probabilities(counts.probabilities)}
    if counts.labelled:
        drawn["reliability.png"] = pictures.draw_reliability(counts.reliability)
        drawn["confusion.png"] = pictures.draw_confusion(counts.confusion, "labelled rows")
    if counts.reasons:
        drawn["rejects.png"] = pictures.draw_rejects(counts.reasons)
    return drawn


def _make_manifest(plan: Plan, unplanned: int, counts: Counts, line: dict[str, Any]) -> dict[str, Any]:
    # `at` removes the query of a URI, which may hold keys.
    places = {"model": plan.model, "input": plan.inputs.root, "output": plan.output}
    located = {name: place.at(place.path).display for name, place in places.items()}
    return {
        "format": FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": line,
        "consistent_rows": counts.consistent,
        "labelled_rows": counts.labelled if plan.config.label_column else None,
        "rejected_by_reason": counts.reasons,
        "rows_by_probability": counts.probabilities,
        "rows_by_digit": counts.digits,
        "rows_by_number": counts.numbers,
        "confusion": counts.confusion if counts.labelled else None,
        "probabilities": counts.probability_metrics(),
        "config": plan.config.model_dump(mode="json") | located,
        "model": {key: plan.card[key] for key in ("sha256", "epoch", "parameters")},
        "precision": plan.precision,
        "int8": plan.card["int8"] if plan.precision == "int8" else None,
        "skipped_files": len(plan.inputs.skipped),
        "files_of_earlier_input": unplanned,
        "versions": versions(),
    }


def say_result(line: dict[str, Any], counts: Counts, new_rejected: int, say: Callable[[str], None]) -> None:
    """Say the counts, the reasons for rejected rows, the share of consistent rows, and with labels the accuracies.

    If this run has rejected no row (`new_rejected`), the reasons are left out: an earlier run has said them.
    """
    usable = line["files"] - line["failed_files"]
    if usable:
        rows = f"{line['scored_rows']:,} of {counted(line['input_rows'], 'row')}"
        say(f"scored {rows} in {counted(usable, 'file')}, each exactly once")
    if line["failed_files"]:
        say(f"{counted(line['failed_files'], 'file')} could not be used: {line['output']}/{FILES_TABLE} says why")
    if line["rejected_rows"]:
        say(f"{counted(line['rejected_rows'], 'row')} rejected: see {line['output']}/{REJECTED}")
    reasons = list(counts.reasons.items()) if new_rejected else []
    for reason, count in reasons[:_REASONS_ON_CONSOLE]:
        say(f"  rejected: {count:,} x {reason}")
    if len(reasons) > _REASONS_ON_CONSOLE:
        say(f"  rejected: {sum(count for _, count in reasons[_REASONS_ON_CONSOLE:]):,} x other reasons")
    if line["scored_rows"]:
        say(f"sum = digit + number in {percent(counts.consistent / line['scored_rows'])} of the rows")
    if counts.labelled:
        say(f"right: {accuracies(line)} ({counted(counts.labelled, 'labelled row')})")
    say(f"predictions: {line['output']}/{PREDICTIONS}")
    say(f"report: {line['output']}/{REPORT}")
