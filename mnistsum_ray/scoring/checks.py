"""Reasons to stop a run: files in the output folder that it must not touch or mix with, and input that it cannot use."""

import json
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.scoring.layout import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.output_folder import OutputListing, list_output
from mnistsum_ray.scoring.provenance import FILE_IDENTITY, has_provenance
from mnistsum_ray.scoring.target import Target
from mnistsum_ray.scoring.totals import Totals
from mnistsum_ray.storage.location import Location

_START_OVER: Final = "--overwrite scores everything again"


def check_output_files(committed: pa.Table, listing: OutputListing, folder: Location) -> None:
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
        if not has_provenance(folder, f"{REJECTED}/{name}"):
            raise RequestError(f"--output {folder.display}: {REJECTED}/{name} is not a file of this program; {advice}")


def check_compatible(
    matched: pa.Table, unplanned: pa.Table, files: pa.Table, source: Location, spec_json: str, output: Location
) -> None:
    """Refuse to put predictions beside those of another model, of changed input files, or of parts that were cut differently.

    Args:
        matched: what `match_outputs` returned for the plan and the published files.
        unplanned: published files that are not in the plan, `provenance.COMMITTED_SCHEMA`.
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
    if key == "temperature":
        return "holds predictions of the same model with other temperatures"
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
    """The full paths of files, as their provenance has them."""
    return pc.binary_join_element_wise(root.at(root.path).display, files["name"], "/")


def check_strict(totals: Totals, failed_files: int, target: Target) -> None:
    """With `--strict`, refuse to publish if a row was rejected or a file failed.

    Raises:
        RunError: names the first rejected row.
    """
    if not failed_files and not totals.rejected_rows:
        return
    text = f"--strict: nothing was published: {totals.rejected_rows:,} rows and {failed_files:,} files cannot be used"
    if not totals.rejected_rows:
        raise RunError(text)
    name = min(list_output(target.folder).rejected or list_output(target.output).rejected)
    folder = next(folder for folder in (target.folder, target.output) if (folder / REJECTED / name).exists())
    with folder.filesystem.open_input_file((folder / REJECTED / name).path) as stream:
        row = pq.read_table(stream, columns=["source_file", "source_row", "reason"]).slice(0, 1).to_pylist()[0]
    raise RunError(
        f"{text}; first: {row['source_file']}, row {row['source_row']}: {row['reason']}; all: {(folder / REJECTED).display}"
    )
