"""Where no cluster can be joined or started, the job says why in one line."""

from pathlib import Path

import pytest
import ray

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.errors import RequestError, TryAgainError


@pytest.fixture(scope="module", autouse=True)
def not_connected() -> None:
    ray.shutdown()


def refusal(kind: type[Exception]) -> str:
    with pytest.raises(kind) as refused:
        connect()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("127.0.0.1:9", TryAgainError, "no cluster answers at 127.0.0.1:9; correct it, or"),
        ("nowhere.invalid:6379", TryAgainError, "no cluster answers at nowhere.invalid:6379"),
        # `ray.init` would try for minutes.
        ("auto", TryAgainError, "no cluster answers at 127.0.0.1:10; correct it, or `ray stop`"),
        ("ray://127.0.0.1:10001", RequestError, "must be HOST:PORT, as `ray start` prints it"),
        ("127.0.0.1:99999", RequestError, "must be HOST:PORT"),
    ],
)
def test_addresses_where_no_cluster_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:10")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refusal(kind).startswith(f"RAY_ADDRESS={address}: {said}")


def test_a_temporary_folder_that_ray_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for folder in ("/proc/nowhere", str(tmp_path / ("x" * 100))):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        said = refusal(RequestError)
        assert said.startswith("Ray cannot be started here: ")
        assert folder in said
        assert said.endswith("; RAY_TMPDIR names another temporary folder, such as /tmp")


def test_a_start_that_takes_too_long_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", fail)
    said = "Ray cannot be started here: The current node timed out during startup."
    assert refusal(TryAgainError) == said
