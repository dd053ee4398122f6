"""Scoring folders: every row is predicted as by plain PyTorch, exactly once."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from tests.conftest import check_predictions, plain_predictions, write_model
from tests.integration.conftest import Scored, score_here

ROWS, FILES = 500, 5
A_FILE = ROWS // FILES

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs; of the first file, every second row has no label, but for two whose labels are no digits."""
    folder = tmp_path_factory.mktemp("exported") / "in"
    export_pairs(
        ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=FILES), print
    )
    path = folder / "part-00000.parquet"
    table = pq.read_table(path)
    half = [None if row % 2 else digit for row, digit in enumerate(table["digit"].to_pylist())]
    half[1], half[3] = 10, -1
    place = table.column_names.index("digit")
    pq.write_table(
        table.set_column(place, "digit", pa.array(half, table.schema.field(place).type)), path
    )
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, exported: Path) -> Scored:
    return score_here(model, exported.parent / "out", exported, label_column="digit")


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])


def expected_of(model: Path, source: pa.Table) -> dict[str, np.ndarray]:
    return plain_predictions(
        model, pixels_view(one_chunk(source["image"])), source["number"].to_numpy().astype(np.int64)
    )


def test_predictions_do_not_depend_on_workers_parts_and_batches(
    model: Path, exported: Path, tmp_path: Path
) -> None:
    scored = score_here(
        model, tmp_path / "out", exported, num_workers=2, max_rows_per_file=77, batch_size=20
    )
    source, table = rows_of(exported), scored.table()
    assert table["row_id"].to_pylist() == source["row_id"].to_pylist()
    check_predictions(table, expected_of(model, source))
    assert scored.line["scored_rows"] == scored.line["input_rows"] == ROWS
    assert (
        max(pq.read_metadata(path).num_rows for path in (scored.output / "predictions").iterdir())
        <= 77
    )


def test_accuracies_and_probabilities_are_those_of_the_rows_with_a_label(finished: Scored) -> None:
    table = finished.table()
    labelled = table.filter(pc.is_in(table["digit"], pa.array(range(10), pa.int8())))
    digits, sums = (
        labelled["digit"].to_numpy(),
        labelled["digit"].to_numpy() + labelled["number"].to_numpy(),
    )
    count = ROWS - A_FILE // 2
    assert (finished.line["scored_rows"], finished.manifest()["labelled_rows"], len(digits)) == (
        ROWS,
        count,
        count,
    )
    assert finished.line["digit_accuracy"] == pytest.approx(
        np.mean(labelled["pred_digit"].to_numpy() == digits)
    )
    assert finished.line["sum_accuracy"] == pytest.approx(
        np.mean(labelled["pred_sum"].to_numpy() == sums)
    )
    assert re.search(
        rf"right: digit [0-9.]+ %, sum [0-9.]+ % \({count:,} labelled rows\)", finished.said
    )
    assert finished.manifest()["consistent_rows"] == sum(table["consistent"].to_pylist())
    # What else is in the manifest follows from the same counts; their definitions are tested in tests/model.
    counted = np.bincount(digits * 10 + labelled["pred_digit"].to_numpy(), minlength=100)
    assert np.ravel(finished.manifest()["confusion"]).tolist() == counted.tolist()


def test_overwrite_replaces_the_output(finished: Scored, exported: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished.output, tmp_path / "out"))
    pairs = Path(shutil.copytree(exported, tmp_path / "in"))
    (pairs / "part-00004.parquet").unlink()
    other = write_model(tmp_path / "other", 1)
    with pytest.raises(
        RequestError,
        match=r"was begun with --model with SHA-256 .*; give the same again, or --overwrite",
    ):
        score_here(other, output, pairs, label_column="digit")
    second = score_here(other, output, pairs, label_column="digit", overwrite=True)
    assert (second.line["resumed_rows"], second.line["scored_rows"]) == (0, ROWS - A_FILE)
    there = {"files.parquet", "manifest.json", "predictions", "report.html", "run.json"}
    assert {path.name for path in output.iterdir()} == there
    source, table = rows_of(pairs), second.table()
    assert table["row_id"].to_pylist() == source["row_id"].to_pylist()
    check_predictions(table, expected_of(other, source))
