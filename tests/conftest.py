"""Data that the tests share: small, real, and made on the spot."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.mnist import SAMPLE


@pytest.fixture(scope="session")
def sample() -> pa.Table:
    """The bundled sample: `image` (784 bytes) and `digit`, sorted by digit."""
    return pq.read_table(SAMPLE)


@pytest.fixture
def write_rows(tmp_path: Path, sample: pa.Table) -> Callable[[int], Path]:
    """Writes so many rows of the sample, all digits alike, as one Parquet file with small row groups."""

    def write(rows: int) -> Path:
        path = tmp_path / f"rows{rows}.parquet"
        pq.write_table(sample.take(pa.array(range(0, 5000, 5000 // rows))[:rows]), path, row_group_size=200)
        return path

    return write
