"""Resume: find the parts that earlier runs have committed, refuse what must not be mixed, and delete what is unfinished."""

import json
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.output import (
    FILES_TABLE,
    OutputListing,
    Target,
    clear_unfinished,
    delete_part,
    list_output,
    read_stamps,
)
from mnistsum_ray.scoring.preflight import ScoringPlan
from mnistsum_ray.scoring.reconcile import match_outputs
from mnistsum_ray.scoring.stamp import FILE_IDENTITY, PREDICTIONS, REJECTED, has_stamp
from mnistsum_ray.storage.location import Location

_START_OVER: Final = "--overwrite scores everything again"


@dataclass(frozen=True)
class CommittedParts:
    """What earlier runs have committed."""

    published: pa.Table
    """`stamp.COMMITTED_SCHEMA` of the output folder when this run began."""
    done: pa.Table
    """Parts of the plan that are committed: `parts.PART_SCHEMA` and `rejected`, the number of their rejected rows."""
    todo: pa.Table
    """`parts.PART_SCHEMA`: the other parts of the plan."""
    unplanned: int
    """Number of published files whose input is not in the plan. They stay, but are not counted."""
    failures: dict[str, str]
    """Input files that an earlier run has reported as unusable: name and reason."""

    def resumed(self, parts: pa.Table) -> tuple[int, int]:
        """Rows of those of `parts` (`parts.PART_SCHEMA`) that are done, and how many of the rows are rejected."""
        done = self.done.filter(pc.is_in(self.done["output"], parts["output"]))
        return pc.sum(done["rows"]).as_py() or 0, pc.sum(done["rejected"]).as_py() or 0


def resume(plan: ScoringPlan, spec_json: str, source: Location, target: Target, console: Console) -> CommittedParts:
    """Compare the plan with the files in the output folder and the staging folder, and delete unfinished files there.

    `spec_json` is `PredictionSpec.canonical_json` of this run, and `source` the input's root.

    Raises:
        RequestError: the output folder holds other files, or predictions that this run must not be mixed with.
        RunError: with `--overwrite`, an unusable input file has predictions in the output.
    """
    output = target.output
    listing = list_output(output)
    published = read_stamps(output, listing.predictions, console.progress)
    _check_output_files(published, listing, output)
    unplanned = 0
    if target.overwrite:
        check_overwrite(plan.files, published, source)
    else:
        others = unplanned_outputs(plan.parts, published)
        _check_compatible(match_outputs(plan.parts, published, spec_json), others, plan.files, source, spec_json, output)
        unplanned = others.num_rows
        if unplanned:
            first = others["source"][0].as_py()
            console.say(f"left as they are: {unplanned:,} output files of input that is not there now, such as {first}")
    # Nothing is deleted before all files are known as this program's and the request has been found compatible.
    clear_unfinished(output, listing)
    committed = published
    if target.staged:
        committed = target.merge(_resume_staging(target.folder, plan.parts, spec_json, console), published)
    matched = match_outputs(plan.parts, committed, spec_json)
    done = matched.filter(matched["done"]).select([*plan.parts.column_names, "rejected"])
    todo = matched.filter(pc.invert(matched["done"])).select(plan.parts.column_names)
    return CommittedParts(published, done, todo, unplanned, {} if target.overwrite else _earlier_failures(output))


def _earlier_failures(output: Location) -> dict[str, str]:
    """The unusable files of the run that finished the output; none where it is not finished."""
    try:
        data = (output / FILES_TABLE).read_bytes()
        table = pq.read_table(pa.BufferReader(data), columns=["file", "status", "reason"])
    except (FileNotFoundError, pa.ArrowException, KeyError):
        return {}
    failed = table.filter(pc.equal(table["status"], "failed"))
    return dict(zip(failed["file"].to_pylist(), failed["reason"].to_pylist(), strict=True))


def unplanned_outputs(parts: pa.Table, committed: pa.Table) -> pa.Table:
    """Return the rows of `committed` that belong to no part of the plan."""
    return committed.filter(pc.invert(pc.is_in(committed["output"], parts["output"])))


def _resume_staging(folder: Location, parts: pa.Table, spec_json: str, console: Console) -> pa.Table:
    """Delete all files in the staging folder but the committed parts of this plan; return those."""
    listing = list_output(folder)
    committed = read_stamps(folder, listing.predictions, console.progress)
    # Parts with errors are left by a run that was killed while it published, or are of another version.
    broken = committed.filter(pc.is_valid(committed["error"]))["output"].to_pylist()
    broken = [name for name in broken if has_stamp(folder, f"{PREDICTIONS}/{name}")]
    for name in broken:
        delete_part(folder, name)
    if broken:
        listing = list_output(folder)
        committed = read_stamps(folder, listing.predictions, console.progress)
    _check_output_files(committed, listing, folder)
    clear_unfinished(folder, listing)
    # Staged files are not published yet, so those of another plan can be deleted.
    matched = match_outputs(parts, committed, spec_json)
    current = pc.is_in(committed["output"], matched.filter(matched["done"])["output"])
    for name in committed.filter(pc.invert(current))["output"].to_pylist():
        delete_part(folder, name)
    return committed.filter(current)


def _check_output_files(committed: pa.Table, listing: OutputListing, folder: Location) -> None:
    """Check that a folder with this listing and these prediction files holds nothing but whole files of this program.

    Raises:
        RequestError: names the first other file.
    """
    advice = "move it away, or choose another folder"
    if listing.others:
        raise RequestError(f"--output {folder.display}: {min(listing.others)} is not a file of this program; {advice}")
    errors = committed.filter(pc.is_valid(committed["error"]))
    if errors.num_rows:
        first = errors.slice(0, 1).to_pylist()[0]
        raise RequestError(f"--output {folder.display}: {PREDICTIONS}/{first['output']} {first['error']}; {advice}")
    expected = set(committed.filter(pc.greater(committed["rejected"], 0))["output"].to_pylist())
    for name in sorted(listing.rejected - expected):
        if not has_stamp(folder, f"{REJECTED}/{name}"):
            raise RequestError(f"--output {folder.display}: {REJECTED}/{name} is not a file of this program; {advice}")


def _check_compatible(
    matched: pa.Table, unplanned: pa.Table, files: pa.Table, source: Location, spec_json: str, output: Location
) -> None:
    """Refuse to put predictions beside those of another model, of changed input files, or of parts that were cut differently.

    Args:
        matched: what `match_outputs` returned for the plan and the published files.
        unplanned: published files that are not in the plan, `stamp.COMMITTED_SCHEMA`.
        files: the input files, `ScoringPlan.files`.
        source: the input's root.
        spec_json: `PredictionSpec.canonical_json` of this run.
        output: the output folder.

    Raises:
        RequestError: says what differs and what to do.
    """
    different = matched.filter(pc.and_(pc.is_valid(matched["committed_spec"]), pc.invert(matched["done"])))
    if different.num_rows:
        error = _part_error(different.slice(0, 1).to_pylist()[0], spec_json)
        raise RequestError(f"--output {output.display}: {error}")
    # The input may have moved, or its root may be another folder now: a file is the same if its name or its full path is.
    for column, current in (("name", files["name"]), ("source", _sources(source, files))):
        again = unplanned.filter(pc.is_in(unplanned[column], current))
        if again.num_rows:
            committed = again.slice(0, 1).to_pylist()[0]
            file = files.slice(pc.index(current, committed[column]).as_py(), 1).to_pylist()[0]
            raise RequestError(f"--output {output.display}: {_file_error(file, committed)}")


def _part_error(part: dict[str, Any], spec_json: str) -> str:
    if part["committed_spec"] != spec_json:
        return f"{_spec_difference(json.loads(part['committed_spec']), json.loads(spec_json))}; {_START_OVER}"
    if any(part[name] != part[f"committed_{name}"] for name in FILE_IDENTITY):
        return f"{part['name']} has changed since it was scored; {_START_OVER}"
    return f"was started with another --max-rows-per-file; give the same again, or {_START_OVER}"


def _file_error(file: dict[str, Any], committed: dict[str, Any]) -> str:
    if file["error"]:
        return (
            f"holds predictions of {file['name']}, which now cannot be used ({file['error']}); repair it, or take it out of the "
            "input"
        )
    if any(file[name] != committed[name] for name in FILE_IDENTITY):
        return f"{file['name']} has changed since it was scored; {_START_OVER}"
    return (
        f"holds the rows of {file['name']} as {committed['output']}, since it was started with another --max-rows-per-file or "
        f"--input; give the same again, or {_START_OVER}"
    )


def _spec_difference(committed: dict[str, Any], current: dict[str, Any]) -> str:
    if committed["model_sha256"] != current["model_sha256"]:
        return (
            f"holds predictions of another model (SHA-256 {committed['model_sha256'][:12]}…, --model has "
            f"{current['model_sha256'][:12]}…)"
        )
    # A difference in precision explains one in `int8`, so that comes last.
    key = next((key for key in current if key != "int8" and committed.get(key) != current[key]), "int8")
    if key == "prediction_columns":
        return "holds predictions with other columns, of another version of this program"
    if key == "int8":
        return "holds predictions of the same model quantized otherwise"
    flag = "--precision" if key == "precision" else f"--{key}-column"
    return f"was started with {flag} {committed.get(key)}, which is now {current[key]}"


def check_overwrite(files: pa.Table, published: pa.Table, source: Location) -> None:
    """With `--overwrite`, refuse to delete published predictions of an input file that cannot be scored again.

    Raises:
        RunError: names the first such file.
    """
    failed = files.filter(pc.is_valid(files["error"]))
    # As in `check_compatible`, the input may have moved or have another root now.
    same_source = pc.is_in(_sources(source, failed), published["source"])
    lost = failed.filter(pc.or_(pc.is_in(failed["name"], published["name"]), same_source))
    if lost.num_rows:
        raise RunError(
            f"--overwrite: nothing was replaced: {lost['name'][0]} cannot be used, and the output holds its predictions; "
            "repair it, or take it out of the input"
        )


def _sources(root: Location, files: pa.Table) -> pa.ChunkedArray:
    """The full paths of files, as their stamps have them."""
    return pc.binary_join_element_wise(root.at(root.path).display, files["name"], "/")
