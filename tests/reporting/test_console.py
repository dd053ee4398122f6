"""Lines and progress of the console, and what it says on silence."""

import io
import logging
import re
import time

import numpy as np
import pytest

from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console
from tests.jobs import wait_until


def test_a_log_has_lines_with_the_time_and_the_run_and_progress_after_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = io.StringIO()
    written = Console(log)
    written.say("a\tline")
    written.run = "mine"
    written.say("epoch 1")
    for rows in (15_000, 15_100):  # too soon
        written.progress("training rows", rows, 50_000, "epoch 2/5")
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    written._bar.start_t -= 100
    written.progress("training rows", 16_000, 50_000, "epoch 2/5")
    written.progress("rows evaluated", 100, 200)  # no rate is known
    written.progress("rows evaluated", 300, 200)  # an estimate
    line, epoch, progress = log.getvalue().splitlines()
    assert line == "a\\tline", "no name of a file steers the terminal"
    assert re.fullmatch(r"\d\d:\d\d:\d\d mine  epoch 1", epoch)
    shown = r"[\d:]{8} mine  training rows: 16,000 of 50,000, epoch 2/5, "
    assert re.fullmatch(rf"{shown}[\d.]+/s, [\d:]+ left", progress)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_stand_above_a_bar_that_is_removed_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    written = Console(terminal)
    for rows in (100, 500):
        written.progress("training rows", rows, 1000, "epoch 1/2")
    written.say("epoch 1")
    written.progress("training rows", 1000, 1000, "epoch 2/2")
    *shown, last = terminal.getvalue().split("\r")
    bars = [bar for bar in shown if bar.startswith(" 50% ")]
    assert "training rows: 500 of 1,000, epoch 1/2, " in bars[0]
    assert "epoch 1\n" in shown
    assert last.strip() == "", "nothing of the bar is left"


@pytest.mark.parametrize("variable", ["CI", "NO_COLOR"])
def test_there_is_no_bar_where_none_is_wanted(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    terminal = Terminal()
    written = Console(terminal)
    for rows in (100, 500):
        written.progress("training rows", rows, 1000)
    assert terminal.getvalue() == ""


def test_a_program_may_take_the_lines_or_silence_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: taken.append(record.getMessage()))
    monkeypatch.setattr(console.LOG, "handlers", [handler])
    log = io.StringIO()
    for level in (logging.INFO, logging.WARNING, logging.INFO):
        console.LOG.setLevel(level)
        Console(log).say("a line")
    assert (taken, log.getvalue()) == (["a line"] * 2, "")


def test_silence_is_reported_until_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.2)
    log = io.StringIO()
    said = re.compile(r"\nno word from the workers for \d s: it has 2 CPUs\n")
    written = Console(log)
    with written.waiting_for("the workers", lambda: "it has 2 CPUs"):
        signs = [time.monotonic()]
        while signs[-1] < signs[0] + 0.5:
            time.sleep(0.02)
            written.say("a line")
            signs.append(time.monotonic())
        # A busy machine may have been silent itself.
        assert max(np.diff(signs)) >= 0.2 or "no word" not in log.getvalue()
        wait_until(lambda: said.search(log.getvalue()))
