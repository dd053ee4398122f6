"""The output folder: the run that it is of, what is refused there, and the files about all parts.

OUTPUT/run.json                      the request, created first, and only if there is none
OUTPUT/predictions/                  the parts, each whole under its name, and nothing else
OUTPUT/files.parquet, report.html    about the whole run, written after all parts
OUTPUT/manifest.json                 written last: while it exists, the output is finished
"""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray import __version__
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import (
    ConflictError,
    MissingFileError,
    RunError,
    TryAgainError,
    counted,
    spelled,
)
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import Console, accuracies
from mnistsum_ray.reporting.report import REPORT, scored_page, versions
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.scoring.parts import (
    NOT_OURS,
    PREDICTIONS,
    START_OVER,
    Part,
    PartsThere,
    list_files,
    read_footers,
    refusal,
)
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Location

RUN_FILE: Final = "run.json"
FILES_TABLE: Final = "files.parquet"

RUN_FORMAT: Final = "mnistsum_ray.score/4"
"""Format of run.json and the manifest, of the stamps, and of how files are cut into parts."""

FILES_TABLE_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),  # null if the footer cannot be read
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "failed": pa.int64(),  # all rows of a file that failed, else 0
        "status": pa.string(),  # `scored` or `failed`; `gone`: scored, and not in --input now
        "reason": pa.string(),  # why the file failed
    }
)
"""`files.parquet`: one row per input file; rows == scored + rejected + failed."""


def read_run(output: Location) -> dict[str, Any] | None:
    """The content of run.json: `format`, `id`, `request`; None where no run has begun.

    RequestError: another program wrote it.
    """
    try:
        run: dict[str, Any] = (output / RUN_FILE).read_json()
        dict(run["request"], format=run["format"])
        return run
    except MissingFileError:
        return None
    except (ValueError, TypeError, KeyError):
        raise refusal(output, f"{RUN_FILE} {NOT_OURS}") from None


def begin(request: ScoreRequest) -> str:
    """Create run.json, or check that the one that is there holds this request; return its id.

    RequestError: another request was begun here, or files of other programs are. Nothing is changed
    then.
    """
    output = request.output
    if read_run(output) is None:
        others = list_files(output)
        # Asked again: a second run may have begun meanwhile, and the files are its own.
        if others and read_run(output) is None:
            raise refusal(output, f"{next(iter(others))} {NOT_OURS}")
        run = {"format": RUN_FORMAT, "id": secrets.token_hex(8), "version": __version__}
        with suppress(ConflictError):  # a second run began at the same time
            (output / RUN_FILE).create(run | {"request": request.identity})
    begun = read_run(output)
    if begun is None:
        raise TryAgainError(f"--output {output.display}: another run has just deleted {RUN_FILE}")
    values = {"format": begun["format"]} | begun["request"]
    for flag, value in ({"format": RUN_FORMAT} | request.identity).items():
        if values.get(flag) != value:
            begun_with = spelled(values.get(flag))
            differs = f"was begun with {flag} {begun_with}, and this run has {spelled(value)}"
            raise refusal(output, f"{differs}; give the same again, or {START_OVER}")
    return str(begun.get("id"))


def delete_output(output: Location, console: Console) -> None:
    """Delete an earlier output, run.json last: until then all files are known to be ours."""
    if read_run(output) is None:
        return
    names = [name for name, *_ in read_footers(output, console)]
    (output / MANIFEST).delete()
    output.delete_files([FILES_TABLE, REPORT, *(f"{PREDICTIONS}/{name}" for name in names)])
    (output / RUN_FILE).delete()


def check_may_go_on(request: ScoreRequest, there: PartsThere) -> None:
    """RequestError: parts are of input that has changed or is gone, and no flag says what to do."""
    if there.stale and not request.config.rescore_changed:
        part, file = next(iter(there.stale.items()))
        problem = f"{PREDICTIONS}/{part} has rows of {file}, which has changed since"
        advice = f"--rescore-changed scores such files again, and {START_OVER}"
        raise refusal(request.output, f"{problem}; {advice}")
    if there.gone and not request.config.keep_gone:
        part, file = next(iter(there.gone.items()))
        problem = f"{PREDICTIONS}/{part} has rows of {file}, which is not in --input now"
        advice = f"--keep-gone leaves such output as it is, and {START_OVER}"
        raise refusal(request.output, f"{problem}; {advice}")


def check_complete(
    request: ScoreRequest, planned: Mapping[str, Part], before: PartsThere, there: PartsThere
) -> None:
    """Check at the end that the folder is of this run still, and holds its parts and no others.

    The name of a part says which rows of which file it has, so each row is there exactly once.

    TryAgainError: it is not so; another run may be at work there.
    """
    missing = sorted(planned.keys() - there.done)
    strange = [*there.stale, *(there.gone.keys() - before.gone.keys())]
    run = read_run(request.output)
    if run is None or run.get("id") != request.run_id:
        problem = f"{RUN_FILE} is of another run now"
    elif missing:
        problem = f"{PREDICTIONS}/{missing[0]} is not there"
        if request.output.is_local:
            problem += " (a local folder must be one that all nodes share)"
    elif strange:
        problem = f"{PREDICTIONS}/{strange[0]} is there, which this run has not written"
    else:
        return
    advice = f"no {MANIFEST} is written; wait for other runs there, and run the command again"
    raise TryAgainError(f"--output {request.output.display}: {problem}; {advice}")


def publish(
    request: ScoreRequest,
    failures: Mapping[str, str],
    there: PartsThere,
    figures: dict[str, Any],
    console: Console,
) -> ScoreResult:
    """Write the files about the run, and the manifest last, and say the result.

    `failures` say of files why they cannot be used; `figures` are those fields of the result that
    the output does not say.

    RunError: nothing could be scored; or with `--strict` something cannot be used, and there is no
    manifest then.
    """
    output = request.output
    totals = _totals(request, failures, there) | figures
    manifest = _manifest(request, totals, there)
    (output / FILES_TABLE).write(_files_table(request, failures, there))
    (output / REPORT).write(scored_page(manifest, there.bad).encode())
    rows, files = counted(totals["input_rows"], "row"), counted(totals["files"], "file")
    console.say(f"scored {totals['scored_rows']:,} of {rows} in {files}, each exactly once")
    if there.bad.total:
        console.say(f"rejected, null in the output: {there.bad.describe()}")
    if there.totals["labelled"]:
        labelled = counted(there.totals["labelled"], "labelled row")
        console.say(f"right: {accuracies(totals)} ({labelled})")
    console.say(f"predictions: {output.display}/{PREDICTIONS}; report: {output.display}/{REPORT}")

    left_out = counted(there.bad.total, "row") + f" and {counted(len(failures), 'file')}"
    why = f"{left_out} cannot be used; {REPORT} and {FILES_TABLE} say why"
    is_whole = not there.bad.total and not failures
    if not is_whole:
        console.say(why)
    if request.config.strict and not is_whole:
        (output / MANIFEST).delete()  # one of a run without --strict
        raise RunError(f"--strict: no {MANIFEST} was written: {why}")
    (output / MANIFEST).write(manifest)
    if not is_whole and not totals["scored_rows"]:
        raise RunError(f"nothing was scored: {why}")
    return ScoreResult(**totals)


def _totals(
    request: ScoreRequest, failures: Mapping[str, str], there: PartsThere
) -> dict[str, Any]:
    """The fields of the result that the output and the input say."""
    rows, rejected_rows = there.totals["rows"], there.bad.total
    failed_rows = sum(file.rows or 0 for file in request.files if file.name in failures)
    totals: dict[str, Any] = {
        "output": request.output.display,
        "input_rows": rows + failed_rows,
        "scored_rows": rows - rejected_rows,
        "rejected_rows": rejected_rows,
        "failed_rows": failed_rows,
        "files": len(request.files),
        "failed_files": len(failures),
    }
    if request.config.label_column:
        known = there.totals["labelled"]
        for head in HEADS:
            right = there.totals[f"{head.name}_right"]
            totals[f"{head.name}_accuracy"] = right / known if known else None
    return totals


def _files_table(
    request: ScoreRequest, failures: Mapping[str, str], there: PartsThere
) -> pa.Buffer:
    """The content of files.parquet."""
    rows: list[dict[str, Any]] = []
    for file in request.files:
        if file.name in failures:
            row = {"scored": 0, "rejected": 0, "failed": file.rows, "status": "failed"}
            rows.append({"file": file.name, "rows": file.rows, "reason": failures[file.name]} | row)
    gone = set(there.gone.values())
    for name, count in there.rows.items():
        rejected = there.rejected[name]
        row = {"scored": count - rejected, "rejected": rejected, "failed": 0}
        status = "gone" if name in gone else "scored"
        rows.append({"file": name, "rows": count, "status": status} | row)
    rows.sort(key=lambda row: str(row["file"]))
    return to_parquet(pa.Table.from_pylist(rows, FILES_TABLE_SCHEMA))


def _manifest(
    request: ScoreRequest, totals: Mapping[str, Any], there: PartsThere
) -> dict[str, Any]:
    config = request.config.model_dump(mode="json")
    locations = {"model": request.model, "input": request.root, "output": request.output}
    config |= {name: location.display for name, location in locations.items()}
    return {
        "format": RUN_FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": totals,
        "consistent_rows": there.totals["consistent"],
        "labelled_rows": there.totals["labelled"] if request.config.label_column else None,
        "rejected_by_reason": there.bad.reasons,
        "config": config,
        "model": {key: request.description[key] for key in ("sha256", "epoch", "parameters")},
        "precision": request.precision,
        "gone_files": len(set(there.gone.values())),
        "versions": versions(),
    }
