"""A cluster of one CPU: each request finishes or is refused at once, and none waits forever."""

import io
import time
from pathlib import Path

import pytest
import ray

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.training.driver import fit
from mnistsum_ray.training.preflight import preflight
from tests.integration.conftest import score_here

EVERY = 25


@pytest.mark.slow
def test_every_request_finishes_or_is_refused_at_once(data: Path, model: Path, tmp_path: Path) -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        for workers in (1, 2):
            started = time.monotonic()
            try:
                config = TrainConfig(data=str(data), epochs=1, sum_head_steps=50, num_workers=workers, storage_path=str(tmp_path))
                run = preflight(config)
                assert fit(run, Console(io.StringIO()))["test"]["rows"] > 0
                assert workers == 1
            except RequestError:
                assert workers == 2
                assert time.monotonic() - started < 5
            started = time.monotonic()
            try:
                output = tmp_path / f"out{workers}"
                scored = score_here(model, output, data, number_column="digit", num_workers=workers)
                assert scored.line["scored_rows"] == 200
                assert workers == 1
            except RequestError:
                assert workers == 2
                assert time.monotonic() - started < 5
    finally:
        ray.shutdown()
