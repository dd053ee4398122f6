"""The plan beside what the output's own files say: what is done, what may not be put together, and whether all rows are there."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.calibration import HEADS, Reliability
from mnistsum_ray.scoring.provenance import PROBABILITY_BINS

_IDENTITY: Final = ("size", "modified", "footer", "first_row", "rows")
"""What an output's metadata must say for it to be that of a part of the plan."""

FILES_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "status": pa.string(),
        "reason": pa.string(),
    }
)
"""`_files.parquet`: status is `scored`, or `failed` with the reason; rows is null where not even the footer could be read."""


def match_outputs(parts: pa.Table, committed: pa.Table, request: str) -> pa.Table:
    """The parts of the plan, in its order, with what is committed of each.

    Returns:
        `plan.PART_SCHEMA`, `scored_found`, `rejected_found`, `rejected`, `counts` (null where nothing is committed), and `done`:
        whether what is committed is of just this part and this request.
    """
    renamed = committed.rename_columns(
        [f"its_{name}" if name in (*_IDENTITY, "request") else name for name in committed.column_names]
    )
    numbered = parts.append_column("order", pa.array(range(parts.num_rows), pa.int64()))
    joined = numbered.join(renamed.drop_columns(["error", "name"]), "output", join_type="left outer").sort_by("order")
    done = pc.equal(joined["its_request"], request)
    for name in _IDENTITY:
        done = pc.and_(done, pc.equal(joined[name], joined[f"its_{name}"]))
    return joined.append_column("done", pc.fill_null(done, False))


@dataclass(frozen=True)
class Totals:
    """What became of all rows."""

    input_rows: int
    scored_rows: int
    rejected_rows: int
    counts: dict[str, int]
    """`consistent`, and where labels are there `labelled`, `digits_right`, `sums_right`."""
    reasons: dict[str, int]
    """Rejected rows by reason, the commonest first."""
    probabilities: dict[str, list[int]]
    """Scored rows by `digit_prob` and by `sum_prob`, in bins of equal width over 0..1."""
    reliability: dict[str, Reliability]
    """By head, of the rows whose label is known."""


def reconcile(files: pa.Table, matched: pa.Table) -> tuple[pa.Table, Totals]:
    """Count what is written, file by file, and compare with the footers of the input.

    Args:
        files: `inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; `error` is set for each file that cannot be used.
        matched: the parts of all other files with what is committed of them, read anew.

    Returns:
        A FILES_SCHEMA table in the order of the files, and the totals.

    Raises:
        RowCountError: names the first file whose rows are not all there exactly once.
    """
    lost = matched.filter(
        pc.invert(
            pc.fill_null(
                pc.and_(
                    matched["done"],
                    pc.and_(
                        pc.equal(matched["rejected"], matched["rejected_found"]),
                        pc.equal(matched["rows"], pc.add(matched["scored_found"], matched["rejected_found"])),
                    ),
                ),
                False,
            )
        )
    )
    if lost.num_rows:
        first = lost.slice(0, 1).to_pylist()[0]
        place = f"{first['name']}: rows {first['first_row']:,} to {first['first_row'] + first['rows'] - 1:,}"
        found = f"{first['scored_found'] or 0:,} predictions and {first['rejected_found'] or 0:,} rejected rows"
        raise RowCountError(f"{place} should be in {first['output']}, which has {found}")
    sums = matched.group_by("name").aggregate([(name, "sum") for name in ("rows", "scored_found", "rejected_found")])
    table = files.select(["name", "rows", "error"]).append_column("order", pa.array(range(files.num_rows), pa.int64()))
    table = table.join(sums, "name", join_type="left outer").sort_by("order")
    good = pc.is_null(table["error"])
    unequal = table.filter(pc.and_(good, pc.invert(pc.fill_null(pc.equal(table["rows"], table["rows_sum"]), False))))
    if unequal.num_rows:
        first = unequal.slice(0, 1).to_pylist()[0]
        raise RowCountError(f"{first['name']}: has {first['rows']:,} rows, of which {first['rows_sum'] or 0:,} are accounted for")
    result = pa.table(
        {
            "file": table["name"],
            "rows": table["rows"],
            "scored": pc.if_else(good, table["scored_found_sum"], 0),
            "rejected": pc.if_else(good, table["rejected_found_sum"], 0),
            "status": pc.if_else(good, "scored", "failed"),
            "reason": table["error"],
        },
        FILES_SCHEMA,
    )
    return result, _totals(result, matched["counts"])


def _totals(files: pa.Table, counts_of_parts: pa.ChunkedArray) -> Totals:
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    bins = {name: np.zeros(PROBABILITY_BINS, np.int64) for name in ("digit_prob", "sum_prob")}
    reliability = {head: Reliability() for head in HEADS}
    for batch in counts_of_parts.chunks:
        for text in batch.to_pylist():
            of_part = json.loads(text)
            reasons.update(of_part.pop("reasons", {}))
            for name, total in bins.items():
                total += np.array(of_part.pop(name))
            for head, sums in of_part.pop("reliability", {}).items():
                reliability[head].add(Reliability.from_json(sums))
            counts.update(of_part)
    scored, rejected = (pc.sum(files[name]).as_py() or 0 for name in ("scored", "rejected"))
    usable = files.filter(pc.equal(files["status"], "scored"))
    return Totals(
        input_rows=pc.sum(usable["rows"]).as_py() or 0,
        scored_rows=scored,
        rejected_rows=rejected,
        counts=dict(counts),
        reasons=dict(reasons.most_common()),
        probabilities={name: total.tolist() for name, total in bins.items()},
        reliability=reliability,
    )
