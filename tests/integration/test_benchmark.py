"""Short runs of the benchmark: each way, and the comparison of accuracies."""

from pathlib import Path

import pytest

from mnistsum_ray.benchmark.suite import measure, parse
from mnistsum_ray.errors import RequestError
from tests.integration.conftest import run_job

pytestmark = pytest.mark.slow

EVERY = 19  # of the fixture `data`, which then has a batch of rows


@pytest.fixture(params=["guide", "ray"])
def way(request: pytest.FixtureRequest, cluster: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way with Ray. Our jobs join the cluster, and Ray's guides start their own."""
    found: str = request.param
    monkeypatch.setenv("RAY_ADDRESS", "local" if found == "guide" else cluster)
    return found


def test_training_in_memory(data: Path) -> None:
    """As the benchmark runs each way: as a process."""
    figures = run_job("benchmark", "train", "--data", data, "--seconds", 0.1, "--way", "memory").line
    assert min(figures["rows_per_second"], figures["first_row_seconds"]) > 0


def test_training(data: Path, way: str) -> None:
    figures = measure(parse(["train", "--data", str(data), "--way", way]))
    assert min(figures["rows_per_second"], figures["first_row_seconds"]) > 0
    assert way == "guide" or 0 <= figures["waiting"] < 1


def test_scoring_without_ray() -> None:
    figures = measure(parse(["score", "--data", "sample", "--rows", "1000", "--seconds", "0.1", "--way", "files"]))
    assert figures["rows_per_second"] > 0
    assert figures["first_row_seconds"] > 1


def test_scoring(way: str) -> None:
    figures = measure(parse(["score", "--data", "sample", "--rows", "1000", "--way", way]))
    assert figures["rows_per_second"] > 0
    assert 1 < figures["first_row_seconds"] < figures["command_seconds"]
    assert figures["rows_lost"] == figures["rows_repeated"] == 0


def test_the_time_to_the_originals_accuracy(cluster: str, data: Path) -> None:
    done = run_job("benchmark", "accuracy", "--data", data, "--repeat", 1, address=cluster)
    line = done.line
    for result in (*line["mean"].values(), *line["runs"]["loader"], *line["runs"]["ray"]):
        assert 0 <= min(result["digit_accuracy"], result["sum_accuracy"]) <= 1
        assert result["seconds"] > 1
    assert [len(runs) for runs in line["runs"].values()] == [2, 1]
    loader, ray = (line["mean"][way]["seconds"] for way in ("loader", "ray"))
    assert line["ratios"] == {"ray / loader": pytest.approx(ray / loader, abs=0.001), "ray / ray": 1}
    assert line["hardware"]["cores"] >= 1
    assert {"torch", "ray"} <= set(line["versions"])
    assert 'ray: {"digit_accuracy": ' in done.err


def test_an_invalid_flag_is_refused() -> None:
    with pytest.raises(RequestError, match="--rows: must be positive"):
        parse(["train", "--rows", "0"])
