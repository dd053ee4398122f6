"""Where no cluster can be joined or started, the job says why in one line."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.errors import RequestError, TryAgainError


@pytest.fixture(scope="module", autouse=True)
def not_connected() -> None:
    ray.shutdown()


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("127.0.0.1:9", TryAgainError, "no cluster answers at 127.0.0.1:9; correct RAY_ADDRESS,"),
        ("auto", TryAgainError, "no cluster answers at 127.0.0.1:10; correct RAY_ADDRESS, or"),
        ("ray://127.0.0.1:10001", RequestError, "must be HOST:PORT, as `ray start` prints it"),
        ("me:top@secret@127.0.0.1:9", RequestError, "must be HOST:PORT"),
    ],
)
def test_a_refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, kind: Any, said: str
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:10")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(kind) as refused:
        connect()
    shown = re.sub(".*secret@", "…@", address)
    assert str(refused.value).startswith(f"RAY_ADDRESS={shown}: {said}")
    assert "secret" not in str(refused.value)


def test_ray_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    too_long = tmp_path / ("x" * 100)  # for the path of a socket
    monkeypatch.setenv("RAY_TMPDIR", str(too_long))
    with pytest.raises(TryAgainError, match=r"^Ray cannot be started here: [^\n]*x{100}[^\n]*$"):
        connect()
