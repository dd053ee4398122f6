"""Metrics of a job. That they arrive: integration/test_train.py and test_score.py."""

import pytest
from ray.util.metrics import Counter

from mnistsum_ray.reporting.prometheus import JobMetrics


def test_a_folder_of_any_name_is_counted_and_no_row_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[float] = []
    inc = Counter.inc

    def recorded(counter: Counter, value: float) -> None:
        inc(counter, value)  # raises for a tag that is not ASCII
        counted.append(value)

    monkeypatch.setattr(Counter, "inc", recorded)
    for totals in ((5, 8, 6, 9), (9, 10)):  # after a failure, and what another job finds
        metrics = JobMetrics("train", "/runs/ü [1]")
        metrics.set(loss=1.0)
        for total in totals:
            metrics.count(rows=total)
    assert counted == [5, 3, 1, 1]
