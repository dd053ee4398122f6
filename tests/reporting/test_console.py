"""Lines and progress of the console, in a log and on a terminal, and what it says on silence."""

import fcntl
import io
import os
import re
import struct
import termios
import time
from contextlib import suppress
from typing import Any

import pytest

from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console

ENTRY: dict[str, Any] = {
    "kind": "epoch", "epoch": 2, "train_loss": 0.5, "rows_per_second": 123_456.0,
    "test": {"digit_accuracy": 0.9946, "sum_accuracy": 0.9927}, "waiting": 0.5, "seconds": 10.0,
}  # fmt: skip
PROGRESS = {
    "kind": "progress", "epoch": 2, "epochs": 5, "rows": 5000, "of_rows": 10_000,
    "rows_per_second": 1000.0, "loss": 1.5,
}  # fmt: skip


def test_a_line_begins_with_the_time_and_the_run() -> None:
    log = io.StringIO()
    written = Console(log)
    written.say("a\tline")
    written.run = "mine"
    written.show(ENTRY)
    line, epoch = log.getvalue().splitlines()
    said = "epoch 2: loss 0.5000, test digit 99.46 %, sum 99.27 %, 123,456 rows/s"
    assert line == "a\\tline", "no name of a file steers the terminal"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  " + re.escape(said), epoch)


def test_progress_is_a_line_in_a_log_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("mnistsum_ray.reporting.console.time.monotonic", lambda: clock[0])
    written = Console(log)
    for clock[0] in (10.0, 20.0, 40.0, 60.0, 80.0):
        written.show(PROGRESS)
    written.say("done")
    written.progress("rows read", 5, 10, 1.0)
    lines = log.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "epoch 2/5, rows: 15,000 of 50,000, loss 1.5000, 1,000/s, 00:35 left"


def test_progress_is_a_bar_that_fits_the_terminal() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    os.set_blocking(leader, False)

    def written() -> str:
        data = b""
        with suppress(BlockingIOError):
            while True:
                data += os.read(leader, 65_536)
        return data.decode()

    with os.fdopen(follower, "w") as stream:
        with Console(stream) as console:
            console.show(PROGRESS)
            console.progress("rows evaluated", 500, 2_000, 1000.0)
            frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[A-Z]", "", written()))
            assert max(map(len, frames)) <= 80
            assert any("epoch 2/5, rows:  30%" in frame and "loss 1.5" in frame for frame in frames)
            assert any("rows evaluated:  25%" in frame for frame in frames), "work has its own bar"
            console.say("a line")
            assert "a line\r\n" in written(), "above the bar"
            console.progress("rows evaluated", 2_000, 2_000, 1000.0)
            written()
            console.say("evaluated")
            assert written() == "evaluated\r\n", "finished work has no bar"
            console.show(PROGRESS)
            written()
        assert not written().strip(" \r\n").replace("\x1b[A", ""), "the bar is taken away"
    os.close(leader)


def test_silence_is_reported_until_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.3)
    log = io.StringIO()
    with Console(log) as written, written.waiting_for("the workers", lambda: "it has 2 CPUs"):
        for _ in range(20):
            time.sleep(0.05)
            written.say("a line")
        assert "no word" not in log.getvalue()
        time.sleep(1.0)
    assert "\nno word from the workers for 0 s: it has 2 CPUs\n" in log.getvalue()
