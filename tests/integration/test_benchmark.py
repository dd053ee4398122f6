"""Short runs of the benchmark: two minutes."""

from pathlib import Path

import pytest

from tests.integration.conftest import run_job

pytestmark = pytest.mark.nightly

EVERY = 5  # of the fixture `data`


def test_both_commands(data: Path) -> None:
    for what in ("train", "score"):
        done = run_job("benchmark", what, "--data", data, "--rows", "600")
        ways = done.line["rows_per_second"]
        assert list(ways) == ["original", "bare", "guide", "project"]
        assert min(ways.values()) > 0
