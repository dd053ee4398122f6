"""What is written about a run, and the refusal of a folder that is another's.

OUTPUT/run.json                      the request, created first, and only if there is none
OUTPUT/predictions/                  the parts, each whole under its name, and nothing else
OUTPUT/files.parquet, report.html    about the whole run, written after all parts
OUTPUT/manifest.json                 written last: while it exists, the output is finished
"""

import json
import secrets
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mnistsum_ray import __version__
from mnistsum_ray.data.columns.base import ReasonCounts
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
    Run,
    read_parts,
    refusal,
)
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import Findings
from mnistsum_ray.task_loader import code_of

RUN_FILE: Final = "run.json"
FILES_TABLE: Final = "files.parquet"

RUN_FORMAT: Final = "mnistsum_ray.score/7"
"""Format of run.json and the manifest, of the footers, and of how files are cut into parts."""

FILES_TABLE_SCHEMA: Final = pa.schema(
    {"file": pa.string()}
    | dict.fromkeys(("rows", "scored", "rejected", "failed"), pa.int64())
    | {"status": pa.string(), "reason": pa.string()}
)
"""One row an input file. rows == scored + rejected + failed; null where no footer says them. Status
is `scored`; `failed`, with a reason; or `gone`: scored, but no longer in --input."""


def read_run(output: Location) -> dict[str, Any]:
    """Return the content of run.json; empty where there is none, or one of another program."""
    with suppress(MissingFileError, ValueError, TypeError, KeyError, AttributeError):
        run: dict[str, Any] = (output / RUN_FILE).read_json()
        if run["format"].startswith("mnistsum_ray."):
            return run
    return {}


def begin(request: ScoreRequest) -> str:
    """Create run.json, or check that the one in the folder holds this request; return its id.

    RequestError, and nothing is changed: here is the output of another request or program.
    """
    output = request.output
    wanted = {"format": RUN_FORMAT} | request.identity
    if not read_run(output):
        others = output.visible_files()
        if others and RUN_FILE not in others:  # a second run may have begun just now
            raise refusal(output, f"{next(iter(others))} {NOT_OURS}")
        with suppress(ConflictError):
            run = {"id": secrets.token_hex(8), "version": __version__}
            run["task_code"] = code_of(type(request.task))
            (output / RUN_FILE).create(wanted | run)
    begun = read_run(output)
    if not begun:
        raise refusal(output, f"{RUN_FILE} {NOT_OURS}")
    for flag, value in wanted.items():
        if begun.get(flag) != value:
            begun_with = spelled(begun.get(flag))
            differs = f"was begun with {flag} {begun_with}, and this run has {spelled(value)}"
            raise refusal(output, f"{differs}; give the same again, or {START_OVER}")
    if "id" not in begun:
        raise refusal(output, f"{RUN_FILE} has no id; {START_OVER}")
    return str(begun["id"])


def check_is_own(request: ScoreRequest) -> None:
    """Raise TryAgainError if another run has begun in the output since, as with --overwrite."""
    if read_run(request.output).get("id") != request.run_id:
        raise other_run(request.output, RUN_FILE)


def other_run(output: Location, name: str) -> TryAgainError:
    """Return the error for a file of the output that another run may have changed."""
    return TryAgainError(
        f"--output {output.display}: {name} is missing or was written by another run; "
        "use a folder that all nodes share, wait for other runs to end, and run the command again"
    )


def delete_output(output: Location, console: Console) -> None:
    """Delete an earlier output, run.json last: until then all files are known to be ours.

    RequestError, and nothing is deleted: a file is not ours.
    """
    if read_run(output):
        names = [f"{PREDICTIONS}/{name}" for name in read_parts(output, {}, console)]
        others = output.visible_files().keys() - {MANIFEST, FILES_TABLE, REPORT, RUN_FILE, *names}
        if others:
            raise refusal(output, f"{min(others)} {NOT_OURS}")
        (output / MANIFEST).delete()
        output.delete_files([FILES_TABLE, REPORT, *names])
        (output / RUN_FILE).delete()


def publish(run: Run, seconds: float, console: Console) -> ScoreResult:
    """Write the files about the run, and the manifest last, and say the result.

    RunError, and no manifest: nothing was scored, or with `--strict` something is rejected.
    TryAgainError, and no manifest: another run has begun in the output.
    """
    request, output = run.request, run.request.output
    counts, sums, rejected = _add_up(run)
    metrics = _metrics(request, counts, sums)
    files = _rows_of_files(run)
    totals = _totals(run, files) | metrics | {"seconds": round(seconds, 1)}
    findings = Findings()
    if totals["scored_rows"]:
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
        "failures": dict(islice(run.rejected_files.items(), 100)),  # files.parquet has all
        "config": request.config.model_dump(mode="json"),
        "model": {key: request.description.get(key) for key in ("sha256", "epoch", "parameters")},
        "versions": versions(),
    }
    table = pa.Table.from_pylist(files, FILES_TABLE_SCHEMA)
    (output / FILES_TABLE).write(to_parquet(table))
    (output / REPORT).write(scored_page(manifest, findings.tables).encode())
    _say_result(request, manifest, console)
    if rejected.total:
        console.say(f"rejected, null in the output: {rejected.describe()}")
    if rejected.total or run.rejected_files:
        problem = f"{counted(rejected.total, 'row')} and {counted(len(run.rejected_files), 'file')}"
        problem += f" rejected; {REPORT} and {FILES_TABLE} say why"
        if request.config.strict or not totals["scored_rows"]:
            (output / MANIFEST).delete()  # that of a run without --strict
            failed = "--strict" if totals["scored_rows"] else "nothing was scored"
            raise RunError(f"{failed}: {problem}; no {MANIFEST} is written")
        console.say(problem)
    check_is_own(request)
    (output / MANIFEST).write(manifest)
    try:
        check_is_own(request)
    except TryAgainError:  # the manifest is of rows that --overwrite has deleted
        (output / MANIFEST).delete()
        raise
    return ScoreResult(**totals)


def _add_up(run: Run) -> tuple[dict[str, Any], Counter[str], ReasonCounts]:
    """Return sums over the parts of what their footers have: counts, metrics, and rejected rows."""
    counts: dict[str, Any] = {}
    metrics: Counter[str] = Counter()
    rejected = ReasonCounts()
    for stored in run.done.values():
        footer = json.loads(stored.footer)
        with calling(run.request.task, "count"):
            for name, count in footer["counts"].items():
                total = counts.setdefault(name, np.zeros_like(count))
                if np.shape(count) != total.shape:  # NumPy would repeat a list of one number
                    raise ValueError(f"{name} has different lengths; give np.bincount a minlength")
                counts[name] = total + count
        metrics.update(footer["metrics"])
        rejected.add(footer["reasons"], [tuple(example) for example in footer["examples"]])
    return {name: count.tolist() for name, count in counts.items()}, metrics, rejected


def _metrics(
    request: ScoreRequest, counts: Mapping[str, Any], sums: Mapping[str, float]
) -> dict[str, float | None]:
    """Return metrics by name where labels are named; None where no scored row has known ones."""
    if not counts.get("labelled_rows"):
        return dict.fromkeys(request.metric_names if request.labels else ())
    with calling(request.task, "reduce_metrics"):
        metrics = request.task.reduce_metrics(counts["labelled_rows"], sums)
        return {name: float(value) for name, value in metrics.items()}


def _rows_of_files(run: Run) -> list[dict[str, Any]]:
    """Return the rows of files.parquet."""
    known_rows = {file.name: file.rows for file in run.request.files}
    files: dict[str, dict[str, Any]] = {}
    for name, reason in run.rejected_files.items():
        rows = known_rows[name]
        files[name] = {"rows": rows, "scored": 0, "rejected": 0, "failed": rows}
        files[name] |= {"status": "failed", "reason": reason}
    for status, parts in (("scored", run.done), ("gone", run.gone)):
        for stored in parts.values():
            nothing = {"rows": 0, "scored": 0, "rejected": 0, "failed": 0, "status": status}
            file = files.setdefault(stored.part.input, nothing)
            file["rows"] += stored.rows
            file["scored"] += stored.rows - stored.rejected_rows
            file["rejected"] += stored.rejected_rows
    return [{"file": name} | files[name] for name in sorted(files)]


def _totals(run: Run, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of the result that are not of the task."""
    of_input = [file for file in files if file["status"] != "gone"]
    totals: dict[str, Any] = {"input_rows": sum(file["rows"] or 0 for file in of_input)}
    for kind in ("scored", "rejected", "failed"):
        totals[f"{kind}_rows"] = sum(file[kind] or 0 for file in of_input)
    return totals | {
        "resumed_rows": sum(run.done[name].rows for name in run.resumed & run.done.keys()),
        "files": len(of_input),
        "failed_files": len(run.rejected_files),
        "rows_per_second": round(run.rows_per_second, 1),
        "output": run.request.output.display,
    }


def _say_result(request: ScoreRequest, manifest: Mapping[str, Any], console: Console) -> None:
    """Say what was scored and how well, and where the output is."""
    totals, labelled_rows = manifest["totals"], manifest["counts"].get("labelled_rows", 0)
    rows, files = counted(totals["input_rows"], "row"), counted(totals["files"], "file")
    console.say(f"scored {totals['scored_rows']:,} of {rows} in {files}")
    if request.labels:
        known = describe_metrics(manifest["metrics"]) if labelled_rows else "not known"
        console.say(f"metrics: {known} ({counted(labelled_rows, 'labelled row')})")
    if manifest["notice"]:
        console.say(manifest["notice"])
    predictions, report = request.output / PREDICTIONS, request.output / REPORT
    console.say(f"predictions: {predictions.display}; report: {report.display}")
