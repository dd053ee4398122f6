"""Reconciliation finds missing and duplicate rows."""

import json
from typing import Any

import pyarrow as pa
import pytest

from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.parts import PART_SCHEMA
from mnistsum_ray.scoring.reconcile import match_outputs, reconcile
from mnistsum_ray.scoring.resume import unplanned_outputs
from mnistsum_ray.scoring.stamp import COMMITTED_SCHEMA

SPEC = "spec"
RELIABILITY = Reliability(nll=0.5, brier=0.25, rows=[0] * 14 + [4], probability=[0.0] * 14 + [3.9], right=[0] * 14 + [4])
FILE_ROWS = {"a": 30, "b": 7, "broken": None}


def input_files() -> pa.Table:
    return pa.table(
        {
            "name": pa.array(FILE_ROWS, pa.string()),
            "rows": pa.array(FILE_ROWS.values(), pa.int64()),
            "error": pa.array([None, None, "is empty"], pa.string()),
        }
    )


def parts() -> pa.Table:
    rows = [("a", "a-0", 0, 20), ("a", "a-1", 20, 10), ("b", "b", 0, 7)]
    identity = {"size": 1, "modified": 2, "footer_sha256": "f", "first_group": 0, "num_groups": 1, "skip_rows": 0}
    keys = ("name", "output", "first_row", "rows")
    return pa.Table.from_pylist([dict(zip(keys, row, strict=True)) | identity for row in rows], PART_SCHEMA)


def committed(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    records = []
    for part in parts().to_pylist():
        rejected = 2 if part["output"] == "a-1" else 0
        counts: dict[str, Any] = {"consistent": 5, "reasons": {"is null": rejected} if rejected else {}}
        counts |= {"digit_prob": [0] * 19 + [part["rows"] - rejected], "sum_prob": [part["rows"] - rejected] + [0] * 19}
        counts |= {"digits": [part["rows"] - rejected] + [0] * 9, "numbers": [0] * 9 + [part["rows"] - rejected]}
        counts |= {"unsure": [[0.5, part["first_row"], 1, 2]], "examples": {"is null": part["first_row"]} if rejected else {}}
        counts["reliability"] = {"digit": vars(RELIABILITY), "sum": vars(Reliability())}
        record = {
            **{key: part[key] for key in ("output", "name", "size", "modified", "footer_sha256", "first_row", "rows")},
            "source": f"/in/{part['name']}",
            "spec": SPEC,
            "rejected": rejected,
            "counts": json.dumps(counts),
            "scored_in_file": part["rows"] - rejected,
            "rejected_in_file": rejected,
        }
        records.append(record | changed.get(part["output"].replace("-", "_"), {}))
    return records


def reconcile_with(records: list[dict[str, Any]]) -> Any:
    return reconcile(input_files(), match_outputs(parts(), pa.Table.from_pylist(records, COMMITTED_SCHEMA), SPEC))


def test_all_rows_there() -> None:
    table, totals = reconcile_with(committed())
    assert table.to_pylist() == [
        {"file": "a", "rows": 30, "scored": 28, "rejected": 2, "status": "scored", "reason": None},
        {"file": "b", "rows": 7, "scored": 7, "rejected": 0, "status": "scored", "reason": None},
        {"file": "broken", "rows": None, "scored": 0, "rejected": 0, "status": "failed", "reason": "is empty"},
    ]
    assert (totals.input_rows, totals.scored_rows, totals.rejected_rows) == (37, 35, 2)
    assert totals.counts == {"consistent": 15}
    assert totals.reasons == {"is null": 2}
    assert totals.examples == {"is null": [("a", 20)]}
    assert (totals.digits, totals.numbers) == ([35] + [0] * 9, [0] * 9 + [35])
    assert totals.unsure[0] == (0.5, "a", 0, 1, 2)
    assert len(totals.unsure) == 3
    assert totals.reliability["digit"].metrics() == pytest.approx({"nll": 0.125, "brier": 0.0625, "ece": 0.025})
    assert sum(totals.reliability["sum"].rows) == 0
    assert totals.probabilities == {"digit_prob": [0] * 19 + [35], "sum_prob": [35] + [0] * 19}


@pytest.mark.parametrize(
    "changed",
    [
        {"scored_in_file": 7},  # a prediction is missing
        {"scored_in_file": 9},  # a prediction is there twice
        {"rejected_in_file": 1},  # a rejected row is missing
        {"scored_in_file": 9, "rejected_in_file": 1},  # the sum is right, but the stamp says otherwise
        {"rows": 9},
        {"first_row": 21},
        {"modified": 3},
        {"spec": "another"},
    ],
    ids=str,
)
def test_a_part_that_differs_from_the_plan_is_named(changed: dict[str, Any]) -> None:
    with pytest.raises(RowCountError, match="a: rows 20 to 29 should be in predictions/a-1"):
        reconcile_with(committed(a_1=changed))


def test_a_missing_part_is_named() -> None:
    with pytest.raises(
        RowCountError, match="a: rows 0 to 19 should be in predictions/a-0, which has 0 predictions and 0 rejected rows"
    ):
        reconcile_with(committed()[1:])


def test_a_file_whose_parts_lack_rows_is_named() -> None:
    matched = match_outputs(parts().slice(1), pa.Table.from_pylist(committed(), COMMITTED_SCHEMA), SPEC)
    with pytest.raises(RowCountError, match="a: has 30 rows, of which 10 are accounted for"):
        reconcile(input_files(), matched)


def test_outputs_that_are_not_in_the_plan_are_found() -> None:
    unplanned = unplanned_outputs(parts().slice(0, 2), pa.Table.from_pylist(committed(), COMMITTED_SCHEMA))
    assert unplanned["output"].to_pylist() == ["b"]
