"""Requests to an S3 server: few for each file that is scored or trained on, and one for a thousand files that are deleted."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.scoring.output import OutputFiles, delete_parts
from mnistsum_ray.scoring.preflight import Request, make_plan
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.scoring.conftest import CONSOLE, write_all

FILES = 20


@pytest.fixture
def requests() -> Iterator[Counter[str]]:
    """The requests to a server that the environment names, by the path of the object or bucket."""
    app, counted = DomainDispatcherApplication(create_backend_app), Counter[str]()

    def answer(environ: Any, start_response: Any) -> Any:
        counted[environ["PATH_INFO"]] += 1
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        locate("s3://counted?allow_bucket_creation=true", "bucket").filesystem.create_dir("counted")
        yield counted
    server.shutdown()
    thread.join()


def test_a_scored_file_costs_seven_requests(requests: Counter[str]) -> None:
    table = pa.table({"image": [bytes(784)] * 10, "number": [1] * 10, "label": [1] * 10})
    folder, output = (locate(f"s3://counted/{name}", "--output").with_retries() for name in ("in", "out"))
    for index in range(FILES):
        writable(folder).write(f"{index:03d}.parquet", to_parquet(table))
    requests.clear()
    config = ScoreConfig(model="m", input=(folder.display,), output=output.display, label_column="label")
    card = {"sha256": "abc", "epoch": 1, "parameters": 1}
    request = Request(config, output, card, {}, list_inputs(config.input, output), output, None)
    plan = make_plan(request, "fp32", writable(output), CONSOLE)
    write_all(plan)
    assert OutputFiles.read(output, plan, CONSOLE).stamps["planned"].to_pylist() == [True] * FILES
    of_files = {path: count for path, count in requests.items() if path.endswith(".parquet")}
    assert len(of_files) == 2 * FILES
    assert sum(of_files.values()) <= 7 * FILES
    assert sum(requests.values()) - sum(of_files.values()) < 10, "listings"

    requests.clear()
    delete_parts(writable(output), plan.parts["output"].to_pylist(), CONSOLE)
    assert requests == {"/counted": 2}, "predictions, and rejected rows"
    assert not output.files()


def test_a_file_of_training_rows_costs_four_requests(requests: Counter[str]) -> None:
    table = pa.table({"image": [bytes(784)] * 10, "label": [1] * 10})
    folder = locate("s3://counted/rows", "--data").with_retries()
    for index in range(FILES):
        writable(folder).write(f"{index:03d}.parquet", to_parquet(table))
    requests.clear()
    source = open_source(folder.display)
    source.data.fetch(np.arange(source.rows))
    of_files = {path: count for path, count in requests.items() if path.endswith(".parquet")}
    assert of_files == {f"/counted/rows/{index:03d}.parquet": 4 for index in range(FILES)}
    assert sum(requests.values()) - sum(of_files.values()) < 10, "listings"
