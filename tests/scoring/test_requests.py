"""Requests to an S3 server: few for each file that is scored."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication

from mnistsum_ray.storage.uri import locate
from tests.scoring.conftest import score, write_rows
from tests.storage.conftest import s3


def test_a_file_costs_four_requests_and_where_it_is_done_five(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, answer = Counter[str](), DomainDispatcherApplication.__call__

    def count(app: Any, environ: Any, start_response: Any) -> Any:
        requests[environ["PATH_INFO"]] += 1
        return answer(app, environ, start_response)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", count)
    write_rows(tmp_path / "a.parquet", [1])
    with s3(monkeypatch, tmp_path) as uri:
        # A prefix of its own: the server keeps what other tests of this process wrote.
        given, output = (locate(uri, "--input") / f"counted/{folder}" for folder in ("in", "out"))
        for index in range(20):
            (given / f"{index}.parquet").write((tmp_path / "a.parquet").read_bytes())
        for each, others, settings in ((4, 18, {}), (5, 14, {}), (5, 24, {"overwrite": True})):
            requests.clear()
            score(model, given.display, output.display, **settings)
            folders = ("/bucket/counted/in/", "/bucket/counted/out/predictions/")
            of_files = [requests[path] for path in requests if path.startswith(folders)]
            assert len(of_files) == 40
            assert sum(of_files) <= each * 20
            assert sum(requests.values()) - sum(of_files) <= others
