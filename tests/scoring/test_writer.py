"""Written parts: columns, metadata and stamp, and how damage to them is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.model.inference import Predictions
from mnistsum_ray.scoring.footers import Columns
from mnistsum_ray.scoring.output import list_output
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.scoring.reader import DecodedPart
from mnistsum_ray.scoring.stamp import FORMAT, KEY, PredictionSpec, has_stamp, read_committed
from mnistsum_ray.scoring.worker import ScoringJob, write_part
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.storage.paths import locate

SPEC = PredictionSpec("abc", "fp32", Columns("image", "number", "label"))


def decoded_part(bad: int = 2, metadata: dict[bytes, bytes] | None = None) -> DecodedPart:
    table = pa.table({"image": [bytes(784)] * 5, "number": [1, 2, 3, 4, 5], "Reason": ["a"] * 5, "label": [0, 1, 2, None, 4]})
    table = table.replace_schema_metadata(metadata)
    good = 5 - bad
    part = Part("deep/in.parquet", 10, 20, "f00", "deep/in-00001-of-00002.parquet", 100, 5, 0, 1, 0)
    return DecodedPart(
        part=part,
        passthrough=table.slice(0, good).drop_columns(["image"]),
        images=np.zeros((good, 28, 28), np.uint8),
        numbers=np.arange(1, good + 1),
        labels=np.array([0, 1, 2, -1, 4][:good]),
        rejected=table.slice(good),
        reasons={row: f"bad {row}" for row in range(good, 5)},
    )


def predictions(count: int) -> Predictions:
    digits = np.arange(count, dtype=np.int8)
    sums = (digits + np.arange(1, count + 1)).astype(np.int8)
    sums[0] = 18
    values = {"pred_digit": digits, "pred_sum": sums}
    values |= {f"{head}_prob": np.full(count, 0.5, np.float32) for head in ("digit", "sum")}
    values |= {f"{head}_{loss}": np.arange(count, dtype=np.float32) for head in ("digit", "sum") for loss in ("nll", "brier")}
    return Predictions(values)


def write(output: Path, decoded: DecodedPart, source: str = "/data") -> None:
    place = locate(str(output), "--output")
    job = ScoringJob(
        parts=None,
        source=locate(source, "--input"),
        output=place,
        spec=SPEC,
        weights=None,
        batch_size=None,
        crash_counter=None,
        lock=FolderLock(place, ""),
    )
    write_part(job, decoded, predictions(len(decoded.numbers)))


def committed(output: Path) -> dict[str, Any]:
    place = locate(str(output), "--output")
    (row,) = read_committed(place, list_output(place).predictions).to_pylist()
    found: dict[str, Any] = row
    return found


def test_a_part_and_its_provenance(tmp_path: Path) -> None:
    write(tmp_path, decoded_part())
    good = pq.ParquetFile(tmp_path / "predictions" / "deep" / "in-00001-of-00002.parquet").read()
    assert good.column_names == ["number", "Reason", "label", "pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
    assert good["consistent"].to_pylist() == [False, True, True]
    bad = pq.ParquetFile(tmp_path / "rejected" / "deep" / "in-00001-of-00002.parquet").read()
    assert bad.column_names == ["image", "number", "input_Reason", "label", "source_file", "source_row", "reason"]
    assert bad["source_row"].to_pylist() == [103, 104]
    assert bad["source_file"].to_pylist() == ["/data/deep/in.parquet"] * 2
    assert bad["reason"].to_pylist() == ["bad 3", "bad 4"]
    stamp = committed(tmp_path)
    assert {key: stamp[key] for key in ("source", "size", "modified", "footer_sha256", "first_row", "rows", "rejected")} == {
        "source": "/data/deep/in.parquet",
        "size": 10,
        "modified": 20,
        "footer_sha256": "f00",
        "first_row": 100,
        "rows": 5,
        "rejected": 2,
    }
    assert (stamp["scored_in_file"], stamp["rejected_in_file"], stamp["error"]) == (3, 2, None)
    assert stamp["spec"] == SPEC.canonical_json()
    counts = json.loads(stamp["counts"])
    assert [counts[name] for name in ("labelled", "digits_right", "sums_right")] == [3, 3, 2]
    reliability = counts["reliability"]
    assert (reliability["digit"]["nll"], reliability["sum"]["brier"]) == (3, 3), "0 + 1 + 2"
    assert (sum(reliability["sum"]["rows"]), sum(reliability["sum"]["right"])) == (3, 2)


def test_metadata_of_the_input_is_kept_but_for_the_entry_of_hugging_face(tmp_path: Path) -> None:
    source = decoded_part(0, {b"pandas": b"{}", b"huggingface": b"{}", b"mine": b"yes"})
    write(tmp_path, source)
    metadata = pq.read_metadata(tmp_path / "predictions" / "deep" / "in-00001-of-00002.parquet").metadata
    assert metadata[b"mine"] == b"yes"
    assert b"pandas" in metadata
    assert b"huggingface" not in metadata
    assert not (tmp_path / "rejected").exists()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (
            lambda folder: (folder / "predictions" / "deep" / "in-00001-of-00002.parquet").write_bytes(b"PAR1 no PAR1"),
            "has a damaged footer",
        ),
        (lambda folder: (folder / "rejected" / "deep" / "in-00001-of-00002.parquet").unlink(), "has lost its rejected rows"),
        (
            lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "predictions" / "deep" / "in-00001-of-00002.parquet"),
            "is not a file of",
        ),
    ],
)
def test_damaged_output_files_get_an_error(tmp_path: Path, damage: Any, error: str) -> None:
    write(tmp_path, decoded_part())
    damage(tmp_path)
    assert error in committed(tmp_path)["error"]


def test_a_file_of_another_version_gets_an_error(tmp_path: Path) -> None:
    write(tmp_path, decoded_part())
    path = tmp_path / "predictions" / "deep" / "in-00001-of-00002.parquet"
    table = pq.ParquetFile(path).read()
    stamp = json.loads(table.schema.metadata[KEY]) | {"format": FORMAT - 1}
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(stamp).encode()}), path)
    assert committed(tmp_path)["error"] == "was written by another version of this program"
    assert has_stamp(locate(str(tmp_path), "--output"), "predictions/deep/in-00001-of-00002.parquet")


def test_keys_in_an_object_store_uri_are_not_written(tmp_path: Path) -> None:
    write(tmp_path, decoded_part(), "s3://key:secret@bucket/in?region=eu-west-1")
    assert committed(tmp_path)["source"] == "s3://bucket/in/deep/in.parquet"
    for path in tmp_path.rglob("*.parquet"):
        assert b"secret" not in path.read_bytes()
