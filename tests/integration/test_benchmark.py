"""Short runs of the benchmark, eight processes: two minutes."""

from pathlib import Path

import pytest

from tests.integration.conftest import run_job

pytestmark = pytest.mark.nightly

EVERY = 5  # of the fixture `data`


def test_both_commands(data: Path) -> None:
    for what in ("train", "score"):
        done = run_job("benchmark", what, "--data", data, "--rows", "600")
        ways = done.line["ways"]
        assert list(ways) == ["original", "bare", "guide", "project"]
        for figures in ways.values():
            assert min(figures.values()) > 0, ways
        assert ways["guide"]["times_guide"] == 1
        assert done.out.splitlines()[0].split() == [
            what,
            "rows_per_second",
            "seconds",
            "times_guide",
        ]
