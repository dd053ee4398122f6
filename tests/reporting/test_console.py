"""Lines and progress of the console, in a log and on a terminal, and the watchdog that reports silence."""

import fcntl
import io
import os
import re
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import pytest

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import Console, time_left

TEST = {f"{head.name}_accuracy": 0.5 for head in HEADS} | {"loss": 0.25, "digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
ENTRY: dict[str, Any] = {
    "epoch": 2, "train_loss": 0.5, "rows_per_second": 123_456.0, "waiting": 0.5, "test": TEST,
    "first_batch_seconds": 4.5, "seconds": 10.0,
}  # fmt: skip
PROGRESS = {
    "kind": "progress", "epoch": 1, "epochs": 5, "rows": 5000, "of_rows": 10_000, "rows_per_second": 1000.0, "loss": 1.5,
}  # fmt: skip


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal of this width; and what has been written to it since the last call."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    os.set_blocking(leader, False)

    def written() -> str:
        data = b""
        with suppress(BlockingIOError):
            while True:
                data += os.read(leader, 65_536)
        return data.decode()

    with os.fdopen(follower, "w") as stream:
        yield stream, written
    os.close(leader)


def test_the_lines_of_an_epoch_have_the_figures_of_the_original_and_fit_a_terminal() -> None:
    """The wait for the first batch, in which files are opened and processes start, does not count."""
    out = io.StringIO()
    Console(out).show({"kind": "epoch", **ENTRY, "epoch": 10_000})
    assert out.getvalue() == "epoch 10000: loss 0.5000, test digit 99.46 %, sum 99.27 %, 123,456 rows/s\n"
    assert len(out.getvalue()) <= 80
    Console(out).show({"kind": "epoch", **ENTRY, "waiting": 0.6})
    assert out.getvalue().endswith("\nepoch 2: the workers waited for data 15.00 % of the time\n")


def test_progress_is_a_line_in_a_log_after_some_seconds_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("mnistsum_ray.reporting.console.time.monotonic", lambda: clock[0])
    console = Console(log)
    for clock[0] in (2.0, 4.0, 6.0, 8.0, 12.0):
        console.show(PROGRESS)
    console.say("done")
    console.progress("rows read", 5, 10, 1.0)
    lines = log.getvalue().splitlines()
    assert len(lines) == 3
    assert "5,000 of 10,000 rows" in lines[0]
    assert "5 s left in this epoch, 45 s in all" in lines[0]


def test_progress_is_a_bar_that_fits_the_terminal() -> None:
    columns = 80
    with terminal(columns) as (stream, written), Console(stream) as console:
        console.show(PROGRESS | {"epoch": 2})
        console.progress("rows evaluated", 500, 2_000, 1000.0)
        frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[A-Z]", "", written()))
        assert max(map(len, frames)) <= columns
        assert any("epoch 2/5:  30%" in frame and "loss 1.5000" in frame for frame in frames)
        assert any("rows evaluated:  25%" in frame for frame in frames), "other work has its own bar"
        console.say("a line")
        assert "a line\r\n" in written(), "above the bar"
        console.progress("rows evaluated", 2_000, 2_000, 1000.0)
        written()
        console.say("evaluated")
        assert written() == "evaluated\r\n", "finished work has no bar"
        console.show(PROGRESS)
        written()
        console.__exit__()
        assert not written().strip(" \r\n").replace("\x1b[A", ""), "the bar is taken away"


def test_silence_is_reported_until_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has ended cannot be asked: it costs only the line."""
    monkeypatch.setattr("mnistsum_ray.reporting.console.SILENCE_SECONDS", 0.2)
    answers: list[str | Exception] = ["it has 2 CPUs", ConnectionError("the cluster has ended"), "it is back"]

    def explain() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    stream = io.StringIO()
    with Console(stream) as console:
        for _ in range(10):
            time.sleep(0.05)
            console.say("a line")
        assert "no word" not in stream.getvalue()
        deadline = time.monotonic() + 10
        with console.waiting_for("the workers", explain):
            while answers and time.monotonic() < deadline:
                time.sleep(0.01)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("no word")]
    assert lines[0] == "no word from the workers for 0.2 s: it has 2 CPUs"
    assert lines[1].endswith(" s: it is back")


@pytest.mark.parametrize(
    ("rows", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5_999, "100 min"), (6_000, "1.7 h"), (36_000, "10.0 h")]
)
def test_time_left_is_short(rows: int, text: str) -> None:
    assert time_left(rows, 1.0) == text
