"""Input files: each that cannot be used has a reason; a column that none has is a wrong request."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.parts import InputFile
from mnistsum_ray.scoring.request import read_footers
from tests.scoring.conftest import CONSOLE

GOOD = pa.table({"image": [bytes(784)] * 3, "number": [1, 2, 3]})
Write = Callable[[Path], object]


def footers(folder: Path, **columns: Any) -> dict[str, InputFile]:
    config = ScoreConfig(model="m", input=(str(folder),), output="o", **columns)
    return {file.name: file for file in read_footers(list_inputs(config.input), config, CONSOLE)}


def damaged(damage: Callable[[bytes], bytes]) -> Write:
    return lambda path: path.write_bytes(damage(to_parquet(GOOD).to_pybytes()))


def with_column(name: str, values: pa.Array | None, **options: Any) -> Write:
    """GOOD with another column; without the column if there are no values."""
    kept = {column: GOOD[column] for column in GOOD.column_names if column != name}
    table = pa.table(kept | ({} if values is None else {name: values}))
    return lambda path: pq.write_table(table, path, **options)


TWO = pa.Table.from_arrays([*GOOD.columns, GOOD["number"]], ["image", "number", "number"])
DAYS = pa.array([datetime(1500, 12, 31)] * 3, pa.timestamp("us"))
DEEP_DAYS = pa.StructArray.from_arrays([GOOD["image"].combine_chunks(), DAYS], ["bytes", "taken"])
INT96 = {"use_deprecated_int96_timestamps": True}
ONES = pa.array([1, 1, 1])
FILES: list[tuple[Write, str, tuple[str, ...]]] = [
    (damaged(lambda whole: b""), "is empty (0 bytes)", ()),
    (damaged(lambda whole: whole[:-1]), "is not Parquet, or was cut off", ()),
    (damaged(lambda whole: whole[:-8] + b"\xff\xff\xff\x7fPAR1"), "has a damaged footer", ()),
    (with_column("number", None), "has no column 'number' but 'image'; --number-column", ()),
    (with_column("number", pa.array([1.0] * 3)), "has type double, not an integer type", ()),
    (with_column("Digit_probs", ONES), "a column 'Digit_probs', which scoring would add", ()),
    (lambda path: pq.write_table(TWO, path), "more than one column 'number'", ()),
    (with_column("day", DAYS, **INT96), "None", ("day (INT96)",)),
    (with_column("image", DEEP_DAYS, **INT96), "None", ()),
]


@pytest.mark.parametrize(("write", "reason", "recast"), FILES)
def test_a_file_that_cannot_be_used_has_a_reason(
    tmp_path: Path, write: Write, reason: str, recast: tuple[str]
) -> None:
    write(tmp_path / "a.parquet")
    two_reads = GOOD.replace_schema_metadata({"note": "x" * 300_000})
    pq.write_table(two_reads, tmp_path / "long.parquet")
    found = footers(tmp_path, probabilities=True)
    assert (found["long.parquet"].rows, found["long.parquet"].error) == (3, None)
    assert reason in str(found["a.parquet"].error)
    assert found["a.parquet"].recast == recast


def test_a_column_that_no_file_has_is_a_wrong_request(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(GOOD.rename_columns(["picture", "number"]), tmp_path / f"{name}.parquet")
    (tmp_path / "empty.parquet").touch()
    said = r"--image-column image: no file of --input has such a column; a\.parquet has no"
    with pytest.raises(RequestError, match=said):
        footers(tmp_path)
    with pytest.raises(RequestError, match="--label-column digit"):
        footers(tmp_path, image_column="picture", label_column="digit")
    # A label of any type costs no file.
    with_column("digit", pa.array(["a", "b", "c"]))(tmp_path / "labels.parquet")
    assert footers(tmp_path, label_column="digit")["labels.parquet"].error is None
