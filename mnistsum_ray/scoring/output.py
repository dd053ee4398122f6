"""The output folder: the run that it is of, what is refused there, and the files about all parts.

OUTPUT/run.json                      the request, created first, and only if there is none
OUTPUT/predictions/                  the parts, each whole under its name, and nothing else
OUTPUT/files.parquet, report.html    about the whole run, written after all parts
OUTPUT/manifest.json                 written last: while it exists, the output is finished
"""

import secrets
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mnistsum_ray import __version__
from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import (
    ConflictError,
    MissingFileError,
    RunError,
    TryAgainError,
    counted,
    spelled,
)
from mnistsum_ray.model.calls import calling
from mnistsum_ray.reporting.console import Console, describe_metrics
from mnistsum_ray.reporting.report import REPORT, versions
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.reporting.scored_report import scored_page
from mnistsum_ray.scoring.parts import (
    NOT_OURS,
    PREDICTIONS,
    START_OVER,
    FoundParts,
    Part,
    as_numbers,
    read_footers,
    refusal,
)
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import Findings
from mnistsum_ray.task_loader import code_of

RUN_FILE: Final = "run.json"
FILES_TABLE: Final = "files.parquet"

RUN_FORMAT: Final = "mnistsum_ray.score/6"
"""Format of run.json and the manifest, of the footers, and of how files are cut into parts."""

FILES_TABLE_SCHEMA: Final = pa.schema(
    {"file": pa.string()}
    | dict.fromkeys(("rows", "scored", "rejected", "failed"), pa.int64())
    | {"status": pa.string(), "reason": pa.string()}
)
"""One row an input file. rows == scored + rejected + failed; null where no footer says them. Status
is `scored`; `failed`, with a reason; or `gone`: scored, but no longer in --input."""


def read_run(output: Location) -> dict[str, Any]:
    """The content of run.json, empty where no run has begun. RequestError: it is not ours."""
    try:
        run: dict[str, Any] = (output / RUN_FILE).read_json()
        if run["format"].startswith("mnistsum_ray."):
            return run
    except MissingFileError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise refusal(output, f"{RUN_FILE} {NOT_OURS}")


def begin(request: ScoreRequest, console: Console) -> str:
    """Create run.json, or check that the one in the folder holds this request; return its id.

    RequestError, and nothing is changed: here is the output of another request or program.
    """
    output = request.output
    wanted = {"format": RUN_FORMAT} | request.identity
    task_code = code_of(type(request.task))
    if not read_run(output):
        others = output.visible_files()
        if others and RUN_FILE not in others:  # a second run may have begun just now
            raise refusal(output, f"{next(iter(others))} {NOT_OURS}")
        with suppress(ConflictError):
            run = {"id": secrets.token_hex(8), "version": __version__, "task_code": task_code}
            (output / RUN_FILE).create(wanted | run)
    begun = read_run(output)
    if not begun:
        raise TryAgainError(f"--output {output.display}: another run has just deleted {RUN_FILE}")
    for flag, value in wanted.items():
        if begun.get(flag) != value:
            begun_with = spelled(begun.get(flag))
            differs = f"was begun with {flag} {begun_with}, and this run has {spelled(value)}"
            raise refusal(output, f"{differs}; give the same again, or {START_OVER}")
    if begun["task_code"] != task_code:
        differs = "its code has changed since this output was begun, and what is there stays"
        console.say(f"--task {request.config.task}: {differs}")
    return str(begun["id"])


def delete_output(output: Location, console: Console) -> None:
    """Delete an earlier output, run.json last: until then all files are known to be ours.

    RequestError, and nothing is deleted: a file is not ours.
    """
    if read_run(output):
        names = [f"{PREDICTIONS}/{name}" for name, *_ in read_footers(output, {}, console)]
        others = output.visible_files().keys() - {MANIFEST, FILES_TABLE, REPORT, RUN_FILE, *names}
        if others:
            raise refusal(output, f"{min(others)} {NOT_OURS}")
        (output / MANIFEST).delete()
        output.delete_files([FILES_TABLE, REPORT, *names])
        (output / RUN_FILE).delete()


def say_what_goes_on(planned: Mapping[str, Part], before: FoundParts, console: Console) -> None:
    """Say how many files of the input are new, have changed or are gone, if there is output."""
    changed, gone = set(before.stale.values()), set(before.gone.values())
    begun = before.rows_by_file.keys() | changed
    if not begun:
        return
    new = {part.input for part in planned.values()} - begun
    said: list[str] = []
    for files, of_one, of_more in (
        (new, "is new", "are new"),
        (changed, "has changed and is scored again", "have changed and are scored again"),
        (gone, "is gone and keeps its output", "are gone and keep their output"),
    ):
        if files:
            count = f"{len(files):,}" if said else counted(len(files), "file")
            said.append(f"{count} {of_one if len(files) == 1 else of_more}")
    if said:
        console.say(", ".join(said))


def check_complete(
    request: ScoreRequest, planned: Set[str], before: FoundParts, found: FoundParts
) -> None:
    """Check at the end that the folder is still of this run, and holds its parts and no others.

    A part's name says which rows of which file it has, so then each row is there exactly once.

    TryAgainError: another run may be at work there.
    """
    missing = sorted(planned - found.done)
    strange = [*found.stale, *(found.gone.keys() - before.gone.keys())]
    if read_run(request.output).get("id") != request.run_id:
        problem = f"{RUN_FILE} is gone, or of another run now"
    elif missing:
        problem = f"{PREDICTIONS}/{missing[0]} is not there"
        if request.output.is_local and not started_cluster():
            problem += " (a local folder must be one that all nodes share)"
    elif strange:
        problem = f"{PREDICTIONS}/{min(strange)} is there, which this run has not written"
    else:
        return
    advice = f"no {MANIFEST} is written; wait for other runs there, and run the command again"
    raise TryAgainError(f"--output {request.output.display}: {problem}; {advice}")


def publish(
    request: ScoreRequest,
    failures: Mapping[str, str],
    found: FoundParts,
    run_figures: dict[str, Any],
    console: Console,
) -> ScoreResult:
    """Write the files about the run, and the manifest last, and say the result.

    `failures` say why files cannot be used; `run_figures` are what no footer says of the result.

    RunError, and no manifest: nothing was scored, or with `--strict` something cannot be used.
    """
    output, rejected = request.output, found.rejected
    counts = {name: np.array(count).tolist() for name, count in found.counts.items()}
    metrics = _metrics(request, found)
    files = _rows_of_files(request, failures, found)
    totals = metrics | _totals(files) | {"output": output.display} | run_figures
    findings = Findings()
    if counts.get("rows", 0) > rejected.total:
        with calling(request.task, "describe"):
            findings = request.task.describe(counts)
    manifest = {
        "format": RUN_FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": totals,
        "counts": counts,
        "metrics": metrics,
        "notice": findings.notice,
        "bad_rows": {"reasons": rejected.reasons, "examples": rejected.examples},
        "failures": dict(islice(failures.items(), 100)),  # files.parquet has all
        "config": request.config.model_dump(mode="json"),
        "model": {key: request.description.get(key) for key in ("sha256", "epoch", "parameters")},
        "versions": versions(),
    }
    (output / FILES_TABLE).write(to_parquet(pa.Table.from_pylist(files, FILES_TABLE_SCHEMA)))
    (output / REPORT).write(scored_page(manifest, findings.tables).encode())
    _say_result(request, manifest, console)
    if rejected.total:
        console.say(f"rejected, null in the output: {rejected.describe()}")
    if rejected.total or failures:
        unusable = f"{counted(rejected.total, 'row')} and {counted(len(failures), 'file')}"
        unusable += f" cannot be used; {REPORT} and {FILES_TABLE} say why"
        if request.config.strict or not totals["scored_rows"]:
            (output / MANIFEST).delete()  # that of a run without --strict
            failed = "--strict" if totals["scored_rows"] else "nothing was scored"
            raise RunError(f"{failed}: {unusable}; no {MANIFEST} is written")
        console.say(unusable)
    (output / MANIFEST).write(manifest)
    return ScoreResult(**totals)


def _say_result(request: ScoreRequest, manifest: Mapping[str, Any], console: Console) -> None:
    """Say what was scored and how well, and where the output is."""
    totals, labelled_rows = manifest["totals"], manifest["counts"].get("labelled_rows", 0)
    rows, files = counted(totals["input_rows"], "row"), counted(totals["files"], "file")
    exactly = ", each exactly once" if totals["scored_rows"] else ""
    console.say(f"scored {totals['scored_rows']:,} of {rows} in {files}{exactly}")
    if request.labels:
        known = describe_metrics(manifest["metrics"]) if labelled_rows else "not known"
        console.say(f"metrics: {known} ({counted(labelled_rows, 'labelled row')})")
    if manifest["notice"]:
        console.say(manifest["notice"])
    predictions, report = request.output / PREDICTIONS, request.output / REPORT
    console.say(f"predictions: {predictions.display}; report: {report.display}")


def _metrics(request: ScoreRequest, found: FoundParts) -> dict[str, float | None]:
    """Metrics by name where labels are named; None where no scored row has known ones."""
    if not request.labels:
        return {}
    labelled_rows = int(found.counts.get("labelled_rows", 0))
    sums = found.metrics if labelled_rows else dict.fromkeys(request.metric_names, 1.0)
    with calling(request.task, "metrics"):
        metrics = as_numbers(request.task.metrics(max(1, labelled_rows), sums))
    return metrics if labelled_rows else dict.fromkeys(metrics)


def _rows_of_files(
    request: ScoreRequest, failures: Mapping[str, str], found: FoundParts
) -> list[dict[str, Any]]:
    """The rows of files.parquet."""
    rows: list[tuple[Any, ...]] = []  # in the order of the schema
    for file in request.files:
        reason = failures.get(file.name)
        if reason:
            rows.append((file.name, file.rows, 0, 0, file.rows, "failed", reason))
    gone = set(found.gone.values())
    for name, count in found.rows_by_file.items():
        status = "gone" if name in gone else "scored"
        rejected = found.rejected_by_file[name]
        rows.append((name, count, count - rejected, rejected, 0, status, None))
    return [dict(zip(FILES_TABLE_SCHEMA.names, row, strict=True)) for row in sorted(rows)]


def _totals(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of the result that follow from the rows of files.parquet."""
    of_input = [file for file in files if file["status"] != "gone"]
    totals: dict[str, Any] = {"input_rows": sum(file["rows"] or 0 for file in of_input)}
    for kind in ("scored", "rejected", "failed"):
        totals[f"{kind}_rows"] = sum(file[kind] or 0 for file in of_input)
    totals["files"] = len(of_input)
    totals["failed_files"] = sum(file["status"] == "failed" for file in of_input)
    return totals
