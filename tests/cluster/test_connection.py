"""Where no cluster can be joined or started, the request is refused in one line; one is started while the request is read."""

import http.server
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from mnistsum_ray.cluster import connection
from mnistsum_ray.cluster.connection import connect, disconnect, is_connected, started_early
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
        ("127.0.0.1:99999", "must be HOST:PORT"),
    ],
)
def test_addresses_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refusal().startswith(f"RAY_ADDRESS={address}: {said}")


def test_the_address_of_a_cluster_that_has_ended_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`ray.init` would try for minutes."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert refusal().startswith("RAY_ADDRESS=auto: the last cluster, at 127.0.0.1:9, does not answer; if it has crashed, `ray")


def test_a_server_that_is_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's dashboard is none."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        assert refusal().startswith(f"RAY_ADDRESS=127.0.0.1:{server.server_port}: no cluster answers there")
        server.shutdown()


def test_a_temporary_folder_that_ray_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for folder in ("/proc/nowhere", str(tmp_path / ("x" * 100))):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        said = refusal()
        assert said.startswith("Ray cannot be started here: ")
        assert folder in said
        assert said.endswith("; RAY_TMPDIR names another temporary folder, such as /tmp")


@pytest.mark.parametrize("started", [False, True], ids=["before Ray starts", "when Ray has started"])
def test_a_request_that_is_refused_while_ray_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch, *, started: bool) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    before = {process.pid for process in psutil.Process().children(recursive=True)}

    def read_request() -> None:
        with started_early():
            while started and not is_connected():
                time.sleep(0.1)
            raise RequestError("the request")

    with pytest.raises(RequestError, match="the request"):
        read_request()
    assert not is_connected()
    assert not {process.pid for process in psutil.Process().children(recursive=True)} - before


def test_the_request_is_read_while_ray_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it prints is shown, and relative paths mean what they mean without Ray. The logs go with the cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    written = 0
    with started_early():
        while not is_connected():
            os.write(2, b"line\n")
            written += 1
            assert Path.cwd() == tmp_path
            time.sleep(0.05)
        connect()
        assert str(tmp_path) not in ray.get(ray.remote(lambda: __import__("sys").path).remote())
    assert capfd.readouterr().err == written * "line\n"
    logs = connection._session
    assert logs is not None
    assert logs.is_dir()
    disconnect()
    assert not logs.exists()
