"""Reconciliation: compare the rows that are in the output files with the rows of the input files."""

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import RowCountError
from mnistsum_ray.scoring.stamp import PART_IDENTITY, PREDICTIONS
from mnistsum_ray.scoring.totals import Totals, add_up

FILES_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),  # null if the footer cannot be read
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "status": pa.string(),  # `scored` or `failed`
        "reason": pa.string(),  # why the file failed
    }
)
"""`files.parquet`: one row per input file."""


def match_outputs(parts: pa.Table, committed: pa.Table, spec_json: str) -> pa.Table:
    """Join the planned parts with the output files of the same names.

    Args:
        parts: `parts.PART_SCHEMA`.
        committed: `stamp.COMMITTED_SCHEMA`.
        spec_json: `PredictionSpec.canonical_json` of this run.

    Returns:
        One row per part, in the order of `parts`: PART_SCHEMA; the columns of COMMITTED_SCHEMA (null where there is no file),
        with the prefix `committed_` where PART_SCHEMA has the same name or the value is compared; and `done`: whether the file
        is of this part of the same input file and of this spec.
    """
    renamed = committed.rename_columns(
        [f"committed_{name}" if name in (*PART_IDENTITY, "spec") else name for name in committed.column_names]
    )
    # A join does not keep the order.
    numbered = parts.append_column("order", pa.array(range(parts.num_rows), pa.int64()))
    joined = numbered.join(renamed.drop_columns(["error", "name"]), "output", join_type="left outer").sort_by("order")
    done = pc.equal(joined["committed_spec"], spec_json)
    for name in PART_IDENTITY:
        done = pc.and_(done, pc.equal(joined[name], joined[f"committed_{name}"]))
    return joined.append_column("done", pc.fill_null(done, False))


def reconcile(files: pa.Table, matched: pa.Table) -> tuple[pa.Table, Totals]:
    """Check that every row of every usable file is in the output exactly once, and count the rows.

    Args:
        files: `inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; `error` is set for each file that cannot be used.
        matched: what `match_outputs` returned for the parts of all other files, with the output files read again.

    Returns:
        A FILES_SCHEMA table in the order of the files, and the totals.

    Raises:
        RowCountError: names the first file with missing or duplicate rows.
    """
    _check_parts(matched)
    sums = matched.group_by("name").aggregate([(name, "sum") for name in ("rows", "scored_in_file", "rejected_in_file")])
    table = files.select(["name", "rows", "error"]).append_column("order", pa.array(range(files.num_rows), pa.int64()))
    table = table.join(sums, "name", join_type="left outer").sort_by("order")
    usable = pc.is_null(table["error"])
    _check_files(table.filter(usable))
    result = pa.table(
        {
            "file": table["name"],
            "rows": table["rows"],
            "scored": pc.if_else(usable, table["scored_in_file_sum"], 0),
            "rejected": pc.if_else(usable, table["rejected_in_file_sum"], 0),
            "status": pc.if_else(usable, "scored", "failed"),
            "reason": table["error"],
        },
        FILES_SCHEMA,
    )
    return result, add_up(result, matched["name"], matched["counts"])


def _check_parts(matched: pa.Table) -> None:
    """Check that each part's files have as many rows as the part."""
    rejected_agree = pc.equal(matched["rejected"], matched["rejected_in_file"])
    rows_agree = pc.equal(matched["rows"], pc.add(matched["scored_in_file"], matched["rejected_in_file"]))
    complete = pc.fill_null(pc.and_(matched["done"], pc.and_(rejected_agree, rows_agree)), False)
    incomplete = matched.filter(pc.invert(complete))
    if incomplete.num_rows:
        first = incomplete.slice(0, 1).to_pylist()[0]
        place = f"{first['name']}: rows {first['first_row']:,} to {first['first_row'] + first['rows'] - 1:,}"
        in_files = f"{first['scored_in_file'] or 0:,} predictions and {first['rejected_in_file'] or 0:,} rejected rows"
        raise RowCountError(f"{place} should be in {PREDICTIONS}/{first['output']}, which has {in_files}")


def _check_files(usable: pa.Table) -> None:
    """Check that the parts of each file have as many rows as its footer says."""
    unequal = usable.filter(pc.invert(pc.fill_null(pc.equal(usable["rows"], usable["rows_sum"]), False)))
    if unequal.num_rows:
        first = unequal.slice(0, 1).to_pylist()[0]
        raise RowCountError(f"{first['name']}: has {first['rows']:,} rows, of which {first['rows_sum'] or 0:,} are accounted for")
