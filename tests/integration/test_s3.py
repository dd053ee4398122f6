"""Scoring on S3 (moto's server), with the same commands and the same results as on a disk."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import score_here


def names(folder: Location) -> set[str]:
    return {file.path.removeprefix(f"{folder.path}/") for file in folder.files()}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_scoring_from_s3_to_s3_gives_what_a_disk_gives(model: Path, tmp_path: Path) -> None:
    roots = {uri: locate(uri, "--output") for uri in ("s3://scores/run", str(tmp_path))}
    for uri, root in roots.items():
        export_pairs(
            ExportPairsConfig(data="sample", output=f"{uri}/pairs", rows=400, files=4), print
        )
        bad = read_table(root / "pairs/part-00001.parquet")
        bad = bad.set_column(2, "number", pa.array([10] * 3 + [1] * 97, pa.int8()))
        (root / "pairs/part-00001.parquet").write(to_parquet(bad))
        (root / "pairs/bad.parquet").write(b"not Parquet at all")
        (root / "model/model.safetensors").write((model / "model.safetensors").read_bytes())

    def score(uri: str, **settings: Any) -> dict[str, Any]:
        return score_here(f"{uri}/model", f"{uri}/out", f"{uri}/pairs/*.parquet", **settings).line

    there, here = (score(uri, label_column="digit", max_rows_per_file=60) for uri in roots)
    timing = {"output", "seconds", "rows_per_second"}
    assert {key: there[key] for key in there.keys() - timing} == {
        key: here[key] for key in here.keys() - timing
    }
    assert (here["rejected_rows"], here["failed_files"]) == (3, 1)
    output, on_disk = (root / "out" for root in roots.values())
    assert names(output) == names(on_disk)
    for name in names(output):
        if name.endswith(".parquet"):
            one, other = (
                pq.read_table(pa.BufferReader((root / name).read_bytes()))
                for root in (output, on_disk)
            )
            assert one.replace_schema_metadata().equals(other.replace_schema_metadata()), name

    assert score("s3://scores/run", overwrite=True)["resumed_rows"] == 0
    about = {"run.json", "files.parquet", "manifest.json", "report.html"}
    assert names(output) == {
        *about,
        *(f"predictions/part-0000{index}.parquet" for index in range(4)),
    }
