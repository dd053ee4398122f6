"""Where no cluster is, and where none can be started, the request is refused in seconds, with one line."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.errors import RequestError


@pytest.fixture(scope="module", autouse=True)
def not_connected() -> None:
    ray.shutdown()


def refusal() -> str:
    with pytest.raises(RequestError) as refused:
        connect()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no cluster answers there; correct it, or unset it to start one here"),
        ("nowhere.invalid:6379", "no cluster answers there"),
        ("ray://127.0.0.1:10001", "must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`"),
        ("http://127.0.0.1:8265", "must be HOST:PORT"),
        ("127.0.0.1", "must be HOST:PORT"),
        ("127.0.0.1:99999", "must be HOST:PORT"),
    ],
)
def test_addresses_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refusal().startswith(f"RAY_ADDRESS={address}: {said}")


@pytest.fixture(params=["HTTP server", "silent server"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is no cluster."""
    if request.param == "silent server":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, stranger: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", stranger)
    assert refusal().startswith(f"RAY_ADDRESS={stranger}: no cluster answers there")


def test_a_temporary_folder_that_ray_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for folder in ("/proc/nowhere", str(tmp_path / ("x" * 100))):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        said = refusal()
        assert said.startswith("Ray cannot be started here: ")
        assert folder in said
        assert said.endswith("; RAY_TMPDIR names another temporary folder, such as /tmp")
