"""Short runs of the benchmark, eight processes: two minutes."""

from pathlib import Path

import pytest

from tests.integration.conftest import run_job


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["train", "score"])
def test_four_ways_are_measured(what: str, data: Path) -> None:
    ways = run_job("benchmark", what, "--data", data, "--rows", "600").line["ways"]
    assert list(ways) == ["original", "bare", "guide", "project"]
    assert all(min(figures.values()) > 0 for figures in ways.values()), ways
