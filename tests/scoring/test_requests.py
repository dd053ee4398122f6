"""Requests to an S3 server: few for each file that is scored or trained on, and one for a thousand files that are deleted."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.scoring.output import OutputFiles, delete_parts
from mnistsum_ray.scoring.preflight import Request, make_plan, read_footers
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.scoring.conftest import CONSOLE, write_all
from tests.storage.conftest import s3

FILES = 20


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3() as uri:
        yield uri


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The requests to the server, by the path of the object or bucket."""
    counted, answer = Counter[str](), DomainDispatcherApplication.__call__

    def count(app: Any, environ: Any, start_response: Any) -> Any:
        counted[environ["PATH_INFO"]] += 1
        return answer(app, environ, start_response)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", count)
    return counted


def write_input(bucket: str) -> str:
    """Write files of ten rows; return the URI of their folder."""
    uri = bucket.replace("bucket?", "bucket/in?")
    data = to_parquet(pa.table({"image": [bytes(784)] * 10, "number": [1] * 10, "label": [1] * 10}))
    for index in range(FILES):
        writable(uri).write(f"{index:03d}.parquet", data)
    return uri


def test_a_scored_file_costs_seven_requests(bucket: str, requests: Counter[str]) -> None:
    uri, output = write_input(bucket), locate(bucket.replace("bucket?", "bucket/out?"), "--output").with_retries()
    requests.clear()
    config = ScoreConfig(model="m", input=(uri,), output="o", label_column="label")
    card = {"sha256": "abc", "epoch": 1, "parameters": 1}
    inputs = list_inputs(config.input, output)
    request = Request(config, output, card, {}, inputs, output, read_footers(inputs, config, CONSOLE))
    plan = make_plan(request, "fp32", writable(output), CONSOLE)
    write_all(plan)
    assert OutputFiles.read(plan, CONSOLE).stamps["planned"].to_pylist() == [True] * FILES
    of_files = {path: count for path, count in requests.items() if path.endswith(".parquet")}
    assert len(of_files) == 2 * FILES
    assert sum(of_files.values()) <= 7 * FILES
    assert sum(requests.values()) - sum(of_files.values()) < 10, "listings"

    requests.clear()
    delete_parts(writable(output), plan.parts["output"].to_pylist(), CONSOLE)
    assert requests == {"/bucket": 2}, "predictions, and rejected rows"
    assert not output.files()


def test_a_file_of_training_rows_costs_four_requests(bucket: str, requests: Counter[str]) -> None:
    uri = write_input(bucket)
    requests.clear()
    source = open_source(uri)
    source.data.fetch(np.arange(source.rows))
    of_files = {path: count for path, count in requests.items() if path.endswith(".parquet")}
    assert of_files == {f"/bucket/in/{index:03d}.parquet": 4 for index in range(FILES)}
    assert sum(requests.values()) - sum(of_files.values()) < 10, "listings"
