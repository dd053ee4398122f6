"""Data and runs on an S3 that speaks HTTP, with the same command and the same result as on a disk."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from mnistsum_ray.mnist import SAMPLE
from mnistsum_ray.storage import locate
from tests.integration.conftest import run_job


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for bucket in ("images", "runs"):
            locate(f"s3://{bucket}?allow_bucket_creation=true", "bucket").filesystem.create_dir(bucket)
        yield
    server.stop()


@pytest.mark.usefixtures("s3")
def test_s3_in_and_out(tmp_path: Path) -> None:
    local = tmp_path / "data" / "rows.parquet"
    local.parent.mkdir()
    pq.write_table(pq.read_table(SAMPLE)[::10], local)
    (locate("s3://images", "--data") / "mnist" / "rows.parquet").write_bytes(local.read_bytes())
    flags = ["--epochs", 1, "--name", "mine"]
    there = run_job("train", "--data", "s3://images/mnist", "--storage-path", "s3://runs/all", *flags)
    here = run_job("train", "--data", local.parent, "--storage-path", tmp_path / "runs", *flags)
    assert there.line["run"] == "s3://runs/all/mine"
    assert there.line["test"] == here.line["test"]
    weights = locate(there.line["model"], "--model") / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "runs" / "mine" / "model" / "model.safetensors").read_bytes()
    again = run_job("train", "--data", "s3://images/mnist", "--storage-path", "s3://runs/all", *flags)
    assert again.code == 2
    assert "s3://runs/all/mine exists" in again.err
