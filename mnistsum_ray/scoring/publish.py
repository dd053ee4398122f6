"""Result of a scoring run: its line; staged files are moved into the output; the pictures, the report and the manifest."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.errors import MissingFileError, RequestError, RunError, UnusableFileError, counted, percent
from mnistsum_ray.reporting.console import Console, Progress, accuracies
from mnistsum_ray.reporting.report import REPORT, draw_pictures, scored_page, versions
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.output import (
    FILES_TABLE,
    LIST,
    MANIFEST,
    MANIFEST_FORMAT,
    SUMMARIES,
    OutputFiles,
    check_overwrite,
    names_below,
    reconcile,
    unpublish,
)
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.preflight import STAGING, Plan
from mnistsum_ray.storage.folder import OutputFolder

_LIST_SCHEMA: Final = pa.schema({"file": pa.string()})
"""`output.LIST`: files to delete in the output, because none of the staging folder takes their place."""

_REASONS_ON_CONSOLE: Final = 10

_MOVE_THREADS: Final = 16
"""An object store copies and deletes each file that is moved, so many moves run at the same time."""


def result_line(plan: Plan, files: pa.Table, counts: RowCounts, resumed_rows: int, scoring_seconds: float) -> dict[str, Any]:
    """The fields of the job's last line, but for `seconds`; `files` is `output.FILES_TABLE_SCHEMA`.

    The seconds are from the start of the first part to the end of the last one; 0 if none was scored.
    """
    usable = pc.equal(files["status"], "scored")
    columns = (files["rows"].filter(usable), files["scored"], files["rejected"], pc.invert(usable))
    input_rows, scored, rejected, failed = (pc.sum(column).as_py() or 0 for column in columns)
    return {
        "output": plan.output.display,
        "input_rows": input_rows,
        "scored_rows": scored,
        "rejected_rows": rejected,
        "failed_rows": 0,
        "resumed_rows": resumed_rows,
        "files": files.num_rows,
        "failed_files": failed,
        "rows_per_second": round((scored + rejected - resumed_rows) / scoring_seconds, 1) if scoring_seconds else 0.0,
    } | (counts.accuracies() if plan.config.label_column else {})


def publish_staged(plan: Plan, published: OutputFiles, console: Console) -> None:
    """Mark the staging folder as complete, and move its files into the output.

    `published` was there when the run began. `--overwrite` deletes its files where none of the same name is moved.

    Raises:
        RunError: rows are missing, or `--overwrite` or `--strict` forbids it.
    """
    staged = OutputFiles.read(plan.folder.place, plan, console)
    stamps, counts, deleted = staged.stamps, staged.counts, set[str]()
    if plan.overwrite:
        check_overwrite(plan, published.stamps)
        deleted = _files_of(published.stamps) - _files_of(stamps)
    else:
        stamps = pa.concat_tables([stamps, published.stamps])
        counts.add(published.counts)
    rejected, failed = pc.sum(reconcile(plan, stamps)["rejected"]).as_py() or 0, len(plan.failures)
    if plan.config.strict and (rejected or failed):
        text = f"--strict: nothing was published: {counted(rejected, 'row')} and {counted(failed, 'file')} cannot be used"
        if rejected:
            place = (plan.folder.place if pc.any(pc.greater(staged.stamps["rejected"], 0)).as_py() else plan.output) / REJECTED
            text += f" below {plan.inputs.root.display}: {counts.describe()}; all: {place.display}"
        raise RunError(text)
    plan.folder.create(LIST, to_parquet(pa.table([sorted(deleted)], _LIST_SCHEMA)))
    move_listed(plan.held, console)


def _files_of(stamps: pa.Table) -> set[str]:
    """Names of the files of parts."""
    rejected = stamps["output"].filter(pc.greater(stamps["rejected"], 0)).to_pylist()
    return {f"{PREDICTIONS}/{name}" for name in stamps["output"].to_pylist()} | {f"{REJECTED}/{name}" for name in rejected}


def move_listed(held: OutputFolder, console: Console) -> bool:
    """Move the files of a complete staging folder into the output, or those that a killed run has left; none without a list.

    The manifest is deleted first, and created after all files are there. The list stays until then: after a kill the same command
    goes on and scores nothing. Returns whether there is a list.

    Raises:
        RequestError: the list is damaged.
    """
    staging = held / STAGING
    try:
        listed = read_table(staging.place / LIST)
        if listed.schema != _LIST_SCHEMA:
            raise UnusableFileError("is not a file of this program")
    except MissingFileError:
        return False
    except UnusableFileError as error:
        raise RequestError(f"--output {held.place.display}: {STAGING}/{LIST} {error}; remove {STAGING}") from None

    moved, there = (
        {top: [f"{top}/{name}" for name in names_below(folder.place / top, console)] for top in (REJECTED, PREDICTIONS)}
        for folder in (staging, held)
    )
    # No name in a damaged list leads to another file.
    deleted = sorted({*there[REJECTED], *there[PREDICTIONS]}.intersection(listed["file"].to_pylist()))
    if count := sum(map(len, moved.values())) + len(deleted):
        console.say(
            f"publishing: {counted(count, 'file')} moved from {staging.place.display}, or deleted where they are replaced"
        )
        progress = Progress(console.progress, "files published", count)
        unpublish(held)
        with ThreadPoolExecutor(_MOVE_THREADS) as pool:
            for of_top in moved.values():  # in this order, as they are committed
                for _ in pool.map(partial(staging.move, target=held), of_top):
                    progress(1)
        held.delete_files(deleted, progress)
    return True


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
    summaries = {FILES_TABLE: to_parquet(files), REPORT: page.encode(), **drawn}
    for name, data in summaries.items():
        plan.held.write(name, data)
    plan.held.delete_files([name for name in SUMMARIES if name not in summaries])  # an earlier run may have drawn them
    plan.held.delete(MANIFEST)  # of a run that had nothing more to score
    plan.held.create(MANIFEST, manifest)
    if (plan.held.place / STAGING / LIST).exists():
        plan.held.delete_folder(STAGING)


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
        "bad_labels": asdict(counts.bad_labels) if plan.config.label_column else None,
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
        "files_of_earlier_input": pc.sum(pc.invert(output.stamps["planned"])).as_py() or 0,
        "versions": versions(),
    }


def say_result(line: dict[str, Any], counts: RowCounts, new_rejected: int, say: Callable[[str], None]) -> None:
    """Say the result in words, with the reasons of rejected rows if this run has rejected some (`new_rejected`)."""
    usable = line["files"] - line["failed_files"]
    if usable:
        rows = f"{line['scored_rows']:,} of {counted(line['input_rows'], 'row')}"
        say(f"scored {rows} in {counted(usable, 'file')}, each exactly once")
    if line["failed_files"]:
        say(f"{counted(line['failed_files'], 'file')} could not be used: {line['output']}/{FILES_TABLE} says why")
    if line["rejected_rows"]:
        say(f"{counted(line['rejected_rows'], 'row')} rejected: see {line['output']}/{REJECTED}")
    if new_rejected:
        reasons = list(counts.reasons.items())
        others = sum(count for _, count in reasons[_REASONS_ON_CONSOLE:])
        for reason, count in reasons[:_REASONS_ON_CONSOLE] + ([("other reasons", others)] if others else []):
            say(f"  rejected: {count:,} x {reason}")
    if line["scored_rows"]:
        say(f"sum = digit + number in {percent(counts.consistent / line['scored_rows'])} of the rows")
    if bad := counts.bad_labels.total:
        say(f"{counted(bad, 'label')} outside 0..{DIGITS - 1}, counted as unknown: {counts.bad_labels.describe()}")
    if counts.labelled:
        say(f"right: {accuracies(line)} ({counted(counts.labelled, 'labelled row')})")
    say(f"predictions: {line['output']}/{PREDICTIONS}")
    say(f"report: {line['output']}/{REPORT}")
