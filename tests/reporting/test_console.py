"""Lines and progress of the console, in a log and on a terminal, and what it says on silence."""

import io
import os
import re
import time
from contextlib import suppress
from typing import Any

import pytest

from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console

ENTRY: dict[str, Any] = {
    "kind": "epoch", "epoch": 2, "train_loss": 0.5, "rows_per_second": 123_456.0,
    "test": {"digit_accuracy": 0.9946, "sum_accuracy": 0.9927},
}  # fmt: skip
PROGRESS = {
    "kind": "progress", "epoch": 2, "epochs": 5, "rows": 5000, "of_rows": 10_000, "loss": 1.5,
}  # fmt: skip


def test_a_log_has_lines_with_the_time_and_the_run_and_progress_after_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.2)
    log = io.StringIO()
    written = Console(log)
    written.say("a\tline")
    written.run = "mine"
    written.show(ENTRY)
    written.show(PROGRESS)
    time.sleep(0.3)
    written.show(PROGRESS | {"rows": 6000})
    written.show(PROGRESS | {"rows": 7000})
    written.progress("files read", 0, 0)
    written.progress("rows evaluated", 300, 200)  # an estimate
    line, epoch, progress = log.getvalue().splitlines()
    said = "epoch 2: loss 0.5000, test digit 99.46 %, sum 99.27 %, 123,456 rows/s"
    assert line == "a\\tline", "no name of a file steers the terminal"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  " + re.escape(said), epoch)
    shown = r"training rows: 16,000 of 50,000, epoch 2/5, loss 1\.5000, \d{4}\.\d\d/s, 00:1\d left"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  " + shown, progress)


def test_a_terminal_has_a_bar_below_the_lines() -> None:
    leader, follower = os.openpty()
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
            console.progress("rows evaluated", 500, 2_000)
            bars = written()
            assert re.search(r"training rows:  30%.*epoch 2/5, loss 1\.5", bars)
            assert "rows evaluated:  25%" in bars, "work has its own bar"
            console.say("a line")
            assert "a line\r\n" in written(), "above the bar"
            console.progress("rows evaluated", 2_000, 2_000)
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
