"""A folder on a disk, and two kinds of stores on this machine: moto (S3) and Azurite."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from threading import Thread
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow.fs import AzureFileSystem
from werkzeug.serving import make_server

from mnistsum_ray.storage.bucket import open_store
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate

KEY = (  # of Azurite, as its documentation has it
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@pytest.fixture(scope="package", params=["disk", "s3", "azure"])
def bucket(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Location]:
    """An empty folder on a disk, and an empty bucket in a store of each kind."""
    folder = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as servers:
        uri = str(folder)
        if request.param != "disk":
            serve = serve_s3 if request.param == "s3" else serve_azure
            uri = servers.enter_context(serve(patch))
        yield locate(uri, "--output")


@contextmanager
def serve_s3(patch: pytest.MonkeyPatch, app: Any = None) -> Iterator[str]:
    """Yield the URI of a bucket, in moto or in another application."""
    with serving(app or DomainDispatcherApplication(create_backend_app)) as port:
        ask(port, "PUT", "/bucket")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield f"s3://bucket?scheme=http&endpoint_override=127.0.0.1:{port}"


@contextmanager
def serve_azure(patch: pytest.MonkeyPatch) -> Iterator[str]:
    command = shutil.which("azurite-blob") or pytest.skip(
        "azurite-blob is not installed: npm install -g azurite"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ("--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port))
    with subprocess.Popen([command, *flags], stdout=-3, stderr=-3) as server:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None
                time.sleep(0.1)
            AzureFileSystem(
                account_name="devstoreaccount1",
                account_key=KEY,
                blob_storage_authority=f"127.0.0.1:{port}",
                blob_storage_scheme="http",
                dfs_storage_authority=f"127.0.0.1:{port}",
                dfs_storage_scheme="http",
            ).create_dir("bucket")
            patch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
            patch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{port}")
            open_store.cache_clear()  # of an earlier server, whose port no URI tells
            yield "abfs://bucket"
        finally:
            server.kill()


@contextmanager
def serving(app: Any) -> Iterator[int]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def ask(
    port: int, method: str, path: str, body: Any = None, headers: Any = None
) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.headers)
