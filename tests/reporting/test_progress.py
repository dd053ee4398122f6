"""Progress lines with rate and time left, and the watchdog that reports silence."""

import time

import pytest

from mnistsum_ray.reporting.progress import Counter, Progress, silence_watchdog, time_left


def test_silence_is_reported_until_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnistsum_ray.reporting.progress.SILENCE_SECONDS", 0.2)
    lines: list[str] = []
    with silence_watchdog(lines.append, lambda: "the cluster has 2 CPUs") as heard:
        for _ in range(10):
            time.sleep(0.05)
            heard()
        assert not lines
        time.sleep(0.5)
    assert lines == [f"no word from the workers for {seconds} s: the cluster has 2 CPUs" for seconds in (0.2, 0.4)]


def test_a_cluster_that_has_ended_leaves_the_line_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnistsum_ray.reporting.progress.SILENCE_SECONDS", 0.05)
    asked: list[float] = []
    lines: list[str] = []

    def explain() -> str:
        asked.append(time.monotonic())
        if len(asked) < 3:
            raise ConnectionError("the cluster has ended")
        return "it is back"

    with silence_watchdog(lines.append, explain):
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines[0].endswith(" s: it is back")


def test_progress_reports_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 20.0])
    monkeypatch.setattr("mnistsum_ray.reporting.progress.time.monotonic", lambda: next(clock))
    counters: list[Counter] = []
    progress = Progress(counters.append, "rows written", 3000)
    for _ in range(5):
        progress(600)
    assert list(map(str, counters)) == [
        "rows written: 1,200 of 3,000  400/s  4 s left",
        "rows written: 2,400 of 3,000  400/s  2 s left",
    ]
    assert [counter.seconds for counter in counters] == [3.0, 6.0]


def test_progress_takes_the_rate_from_the_working_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 30.0])
    monkeypatch.setattr("mnistsum_ray.reporting.progress.time.monotonic", lambda: next(clock))
    counters: list[Counter] = []
    Progress(counters.append, "rows scored", 3000)(1000, working_seconds=10.0)
    assert list(map(str, counters)) == ["rows scored: 1,000 of 3,000  100/s  20 s left"]


@pytest.mark.parametrize(
    ("rows", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5_999, "100 min"), (6_000, "1.7 h"), (36_000, "10.0 h")]
)
def test_time_left_is_short(rows: int, text: str) -> None:
    assert time_left(rows, 1.0) == text
