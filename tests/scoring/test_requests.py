"""Requests to an S3 server: few for each file that is scored, and one for a thousand files that are deleted."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.scoring.output import OutputFiles, delete_parts
from tests.conftest import writable
from tests.scoring.conftest import CONSOLE, plan_of, write_all
from tests.storage.conftest import s3

FILES = 20


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The requests to the server, by the path of the object or bucket."""
    counted, answer = Counter[str](), DomainDispatcherApplication.__call__

    def count(app: Any, environ: Any, start_response: Any) -> Any:
        counted[environ["PATH_INFO"]] += 1
        return answer(app, environ, start_response)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", count)
    return counted


def test_a_scored_file_costs_seven_requests(requests: Counter[str]) -> None:
    with s3() as bucket:
        pairs, scored = (bucket.replace("bucket?", f"bucket/{folder}?") for folder in ("in", "out"))
        data = to_parquet(pa.table({"image": [bytes(784)] * 10, "number": [1] * 10, "label": [1] * 10}))
        for index in range(FILES):
            writable(pairs).write(f"{index:03d}.parquet", data)
        requests.clear()
        plan = plan_of(pairs, scored, label_column="label")
        write_all(plan)
        assert OutputFiles.read(plan, CONSOLE).stamps["planned"].to_pylist() == [True] * FILES
        of_files = {path: count for path, count in requests.items() if path.endswith(".parquet")}
        assert len(of_files) == 2 * FILES
        assert sum(of_files.values()) <= 7 * FILES
        assert sum(requests.values()) - sum(of_files.values()) < 10, "listings"

        requests.clear()
        delete_parts(plan.held, plan.parts["output"].to_pylist(), CONSOLE)
        assert requests == {"/bucket": 2}, "predictions, and rejected rows"
        assert not plan.output.files()
