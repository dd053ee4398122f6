"""A short run of the benchmark measures every way."""

import time
from pathlib import Path

import pytest

from mnistsum_ray.model import int8
from tests.integration.conftest import run_job

pytestmark = pytest.mark.slow

EVERY = 5  # for the fixture `data`: every fifth row of the sample


def test_training(data: Path) -> None:
    done = run_job("benchmark", "train", "--data", data, "--repeat", 1, "--seconds", 1, "--epochs", 2)
    line = done.line
    assert set(line["median"]) == {"loader", "memory", "worker", "ray"}
    for way in line["median"].values():
        assert way["rows_per_second"] > 0
        assert way["startup_seconds"] > way["first_batch_seconds"] > 0
    ours = line["median"]["ray"]
    assert 0 <= ours["waiting"] < 1
    assert ours["between_epochs_seconds"] >= 0
    assert line["ratios"]["ray / memory"] == pytest.approx(
        ours["rows_per_second"] / line["median"]["memory"]["rows_per_second"], abs=0.002
    )
    assert line["hardware"]["cores"] >= 1
    assert {"torch", "ray"} <= set(line["versions"])
    assert "ray / loader: " in done.err


@pytest.mark.skipif(int8.unavailable_reason() is not None, reason="this PyTorch has no integer convolutions on this CPU")
def test_scoring_with_8_bit_integers() -> None:
    """As the benchmark runs each way, in its own process: all of them take minutes."""
    flags = ["--data", "sample", "--seconds", 1, "--rows", 2000, "--way", "ray-int8", "--command-time", time.time()]
    line = run_job("benchmark", "score", *flags).line
    assert line["rows_per_second"] > 0
    assert line["first_file_seconds"] > 1
    flags[flags.index("ray-int8")] = "files-int8"
    assert run_job("benchmark", "score", *flags).line["rows_per_second"] > 0


def test_the_time_to_the_originals_accuracy(data: Path) -> None:
    done = run_job("benchmark", "accuracy", "--data", data, "--repeat", 1)
    line = done.line
    for result in (line["loader"], line["ray"], *line["seeds"]):
        assert 0.2 < result["digit_accuracy"] <= 1
        assert 0 < result["sum_accuracy"] <= 1
        assert result["seconds"] > 1
    assert len(line["seeds"]) == 1
    assert line["reached"] is False, "the few rows are not enough for the original's accuracy"
    assert line["times_faster"] == pytest.approx(line["loader"]["seconds"] / line["ray"]["seconds"], abs=0.01)
    assert "ray, seed 0: digit_accuracy " in done.err


def test_an_invalid_flag_is_refused() -> None:
    done = run_job("benchmark", "train", "--epochs", 1)
    assert done.code == 2
    assert "--epochs: must be at least 2" in done.err
