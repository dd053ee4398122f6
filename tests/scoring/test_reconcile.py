"""The count at the end finds every way in which rows can be missing or doubled."""

import json
from typing import Any

import pyarrow as pa
import pytest

from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.calibration import Reliability
from mnistsum_ray.scoring.plan import PART_SCHEMA
from mnistsum_ray.scoring.provenance import COMMITTED_SCHEMA
from mnistsum_ray.scoring.reconcile import match_outputs, reconcile
from mnistsum_ray.scoring.resume import unplanned_outputs

REQUEST = "request"
RELIABILITY = Reliability(nll=0.5, brier=0.25, rows=[0] * 14 + [4], probability=[0.0] * 14 + [3.9], right=[0] * 14 + [4])
FILE_ROWS = {"a": 30, "b": 7, "broken": None}


def files() -> pa.Table:
    return pa.table(
        {
            "name": pa.array(FILE_ROWS, pa.string()),
            "rows": pa.array(FILE_ROWS.values(), pa.int64()),
            "error": pa.array([None, None, "is empty"], pa.string()),
        }
    )


def parts() -> pa.Table:
    rows = [("a", "a-0", 0, 20), ("a", "a-1", 20, 10), ("b", "b", 0, 7)]
    identity = {"size": 1, "modified": 2, "footer": "f", "first_group": 0, "groups": 1, "skip": 0}
    keys = ("name", "output", "first_row", "rows")
    return pa.Table.from_pylist([dict(zip(keys, row, strict=True)) | identity for row in rows], PART_SCHEMA)


def committed(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    records = []
    for part in parts().to_pylist():
        rejected = 2 if part["output"] == "a-1" else 0
        counts: dict[str, Any] = {"consistent": 5, "reasons": {"is null": rejected} if rejected else {}}
        counts |= {"digit_prob": [0] * 19 + [part["rows"] - rejected], "sum_prob": [part["rows"] - rejected] + [0] * 19}
        counts["reliability"] = {"digit": RELIABILITY.as_json(), "sum": Reliability().as_json()}
        record = {
            **{key: part[key] for key in ("output", "name", "size", "modified", "footer", "first_row", "rows")},
            "source": f"/in/{part['name']}",
            "request": REQUEST,
            "rejected": rejected,
            "counts": json.dumps(counts),
            "scored_found": part["rows"] - rejected,
            "rejected_found": rejected,
        }
        records.append(record | changed.get(part["output"].replace("-", "_"), {}))
    return records


def run(records: list[dict[str, Any]]) -> Any:
    return reconcile(files(), match_outputs(parts(), pa.Table.from_pylist(records, COMMITTED_SCHEMA), REQUEST))


def test_all_rows_there() -> None:
    table, totals = run(committed())
    assert table.to_pylist() == [
        {"file": "a", "rows": 30, "scored": 28, "rejected": 2, "status": "scored", "reason": None},
        {"file": "b", "rows": 7, "scored": 7, "rejected": 0, "status": "scored", "reason": None},
        {"file": "broken", "rows": None, "scored": 0, "rejected": 0, "status": "failed", "reason": "is empty"},
    ]
    assert (totals.input_rows, totals.scored_rows, totals.rejected_rows) == (37, 35, 2)
    assert totals.counts == {"consistent": 15}
    assert totals.reasons == {"is null": 2}
    assert totals.reliability["digit"].metrics() == pytest.approx({"nll": 0.125, "brier": 0.0625, "ece": 0.025})
    assert totals.reliability["sum"].total == 0
    assert totals.probabilities == {"digit_prob": [0] * 19 + [35], "sum_prob": [35] + [0] * 19}


@pytest.mark.parametrize(
    "changed",
    [
        {"scored_found": 7},  # a prediction is missing
        {"scored_found": 9},  # one is there twice
        {"rejected_found": 1},  # a rejected row is missing
        {"scored_found": 9, "rejected_found": 1},  # the sum is right, but not what the writer says
        {"rows": 9},
        {"first_row": 21},
        {"modified": 3},
        {"request": "another"},
    ],
    ids=str,
)
def test_what_is_not_as_planned_is_named(changed: dict[str, Any]) -> None:
    with pytest.raises(RowCountError, match="a: rows 20 to 29 should be in a-1"):
        run(committed(a_1=changed))


def test_a_part_that_nobody_wrote_is_named() -> None:
    with pytest.raises(RowCountError, match="a: rows 0 to 19 should be in a-0, which has 0 predictions and 0 rejected rows"):
        run(committed()[1:])


def test_a_plan_that_has_not_all_rows_of_a_file_is_found_out() -> None:
    matched = match_outputs(parts().slice(1), pa.Table.from_pylist(committed(), COMMITTED_SCHEMA), REQUEST)
    with pytest.raises(RowCountError, match="a: has 30 rows, of which 10 are accounted for"):
        reconcile(files(), matched)


def test_what_is_beside_the_plan_is_told_apart() -> None:
    strange = unplanned_outputs(parts().slice(0, 2), pa.Table.from_pylist(committed(), COMMITTED_SCHEMA))
    assert strange["output"].to_pylist() == ["b"]
