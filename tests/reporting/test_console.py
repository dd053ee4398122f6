"""Lines and progress of the console, in a log and on a terminal, and what it says on silence."""

import io
import logging
import os
import re
import time
from contextlib import suppress

import pytest

from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console


def test_a_log_has_lines_with_the_time_and_the_run_and_progress_after_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 1.0)
    log = io.StringIO()
    written = Console(log)
    written.say("a\tline")
    written.run = "mine"
    written.say("epoch 1")
    written.progress("training rows", 15_000, 50_000, "epoch 2/5")
    time.sleep(1.1)
    written.progress("training rows", 15_000, 50_000, "epoch 2/5")  # no rate is known
    written.progress("training rows", 16_000, 50_000, "epoch 2/5")
    written.progress("training rows", 17_000, 50_000, "epoch 2/5")
    written.progress("files read", 0, 0)
    written.progress("rows evaluated", 300, 200)  # an estimate
    line, epoch, progress = log.getvalue().splitlines()
    assert line == "a\\tline", "no name of a file steers the terminal"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  epoch 1", epoch)
    shown = r"training rows: 16,000 of 50,000, epoch 2/5, \d+\.\d\d/s, \d\d:\d\d left"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  " + shown, progress)


def test_a_program_may_take_the_lines_or_silence_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: taken.append(record.getMessage()))
    monkeypatch.setattr(console.LOG, "handlers", [handler])
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    log = io.StringIO()
    written = Console(log)
    written.progress("files read", 0, 9)
    written._bar.start_t -= 100
    written.progress("files read", 5, 9)
    assert re.fullmatch(r"files read: 5 of 9, 20\.\d\ds/item, 01:20 left", taken[0])
    console.LOG.setLevel(logging.WARNING)
    written.say("a line")
    console.LOG.setLevel(logging.INFO)
    assert (len(taken), log.getvalue()) == (1, "")


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
            console.progress("training rows", 15_000, 50_000, "epoch 2/5")
            console.progress("rows evaluated", 500, 2_000)
            bars = written()
            assert re.search(r"training rows:  30%.*epoch 2/5", bars)
            assert "rows evaluated:  25%" in bars, "work has its own bar"
            console.progress("rows evaluated", 2_000, 2_000)
            written()
            console.say("evaluated")
            assert written() == "evaluated\r\n", "finished work has no bar"
            console.progress("training rows", 15_000, 50_000)
            written()
        assert not written().strip(" \r\n").replace("\x1b[A", ""), "the bar is taken away"
    os.close(leader)


def test_silence_is_reported_until_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.3)
    log = io.StringIO()
    with Console(log) as written, written.waiting_for("the workers", lambda: "it has 2 CPUs"):
        longest, last = 0.0, time.monotonic()
        for _ in range(20):
            time.sleep(0.05)
            written.say("a line")
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        # A busy machine may have been silent itself.
        assert longest >= 0.3 or "no word" not in log.getvalue()
        time.sleep(1.0)
    assert re.search(r"\nno word from the workers for \d s: it has 2 CPUs\n", log.getvalue())
