"""Data, runs and predictions on S3 (moto's server), with the same commands and the same results as on a disk."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig, ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.scoring.preflight import read_footers
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate, locate_existing
from tests.conftest import writable
from tests.integration.conftest import score_here
from tests.scoring.conftest import CONSOLE


def table(place: Location) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(place.read_bytes())).read().replace_schema_metadata()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_scoring_from_s3_to_s3_gives_what_a_disk_gives(model: Path, tmp_path: Path) -> None:
    uris = {"there": "s3://scores/run", "here": str(tmp_path)}
    roots = {where: locate(uri, "--output") for where, uri in uris.items()}
    for where, root in roots.items():
        export_pairs(ExportPairsConfig(data="sample", output=f"{uris[where]}/pairs", rows=400, files=4), print)
        writable(root / "pairs").write("bad.parquet", b"not Parquet at all")
        bad = table(root / "pairs" / "part-00001.parquet").set_column(2, "number", pa.array([10] * 3 + [1] * 97, pa.int8()))
        writable(root / "pairs").write("part-00001.parquet", to_parquet(bad))
        writable(root / "model").write("model.safetensors", (model / "model.safetensors").read_bytes())

    def score(where: str, **settings: Any) -> dict[str, Any]:
        uri = uris[where]
        return score_here(f"{uri}/model", f"{uri}/out", f"{uri}/pairs/*.parquet", **settings).line

    there, here = (score(where, label_column="digit", max_rows_per_file=60) for where in uris)
    timing = {"output", "seconds", "rows_per_second"}
    assert {key: there[key] for key in there.keys() - timing} == {key: here[key] for key in here.keys() - timing}
    assert (here["rejected_rows"], here["failed_files"]) == (3, 1)
    names = {where: [info.path.removeprefix(root.path) for info in (root / "out").files()] for where, root in roots.items()}
    assert names["there"] == [name for name in names["here"] if name != "/out/_lock"]
    rejected = "/out/rejected/part-00001-00000-of-00002.parquet"
    for name in names["there"]:
        if name.endswith(".parquet"):
            one, other = (table(root / name[1:]) for root in roots.values())
            if name == rejected:
                assert one["source_file"].unique().to_pylist() == ["s3://scores/run/pairs/part-00001.parquet"]
                one, other = (side.drop_columns(["source_file"]) for side in (one, other))
            assert one.equals(other), name
    assert rejected in names["there"]

    assert score("there", overwrite=True)["resumed_rows"] == 0
    out = roots["there"] / "out"
    assert {info.path.removeprefix(f"{out.path}/") for info in out.files()} == {
        *("files.parquet", "manifest.json", "report.html"),
        "rejected/part-00001.parquet",
        *(f"predictions/part-0000{index}.parquet" for index in range(4)),
    }


@pytest.mark.usefixtures("s3")
def test_a_key_with_an_empty_part_is_set_aside_and_a_glob_may_have_a_query(tmp_path: Path, sample: pa.Table) -> None:
    """As `s3://b//out` with an empty variable. Object stores take such a key, and Arrow does not."""
    client, data = boto3.client("s3"), to_parquet(sample[:3].append_column("number", pa.array([1] * 3))).to_pybytes()
    for key in ("odd/in/a.parquet", "odd/in//a.parquet", "odd/in/b//c.parquet"):
        client.put_object(Bucket="scores", Key=key, Body=data)
    query = f"endpoint_override={quote(os.environ['AWS_ENDPOINT_URL'])}"
    for uri in ("s3://scores/odd/in", f"s3://scores/odd/in/**/*.parquet?{query}"):
        inputs = list_inputs([uri])
        files = read_footers(inputs, ScoreConfig(model="m", input=(uri,), output=str(tmp_path)), CONSOLE)
        errors = dict(zip(files["name"].to_pylist(), files["error"].to_pylist(), strict=True))
        assert errors.pop("a.parquet") is None
        assert set(errors) == {"/a.parquet", "b//c.parquet"}
        assert set(errors.values()) == {"its name has an empty part between two slashes; rename it"}
    with pytest.raises(RequestError, match=r"--model s3://scores//out: .*Empty path component"):
        locate_existing("s3://scores//out", "--model")
