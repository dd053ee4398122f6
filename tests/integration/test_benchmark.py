"""Short runs of the benchmark: two minutes."""

import pytest

from tests.jobs import run_job


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["train", "score"])
def test_four_ways_are_measured(what: str) -> None:
    line = run_job("benchmark", what, "--rows", "600").line
    ways = line["rows_per_second"]
    assert list(ways) == ["original", "bare", "guide", "project"]
    assert min(ways.values()) > 0
