"""Counters with rate and time left, and a watchdog that reports silence."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

UPDATE_SECONDS: Final = 2.0
"""Minimum time between two updates; the console shows fewer of them where they stay as lines."""

SILENCE_SECONDS: Final = 60
"""Time without a sign of life after which `silence_watchdog` writes a line."""


@dataclass(frozen=True)
class Counter:
    """How far some work is. As text: a line for a log."""

    what: str
    """Names the items, e.g. `rows written`."""
    done: int
    total: int
    rate: float
    """Items per second."""
    seconds: float
    """Since the work began."""

    def __str__(self) -> str:
        left = time_left(self.total - self.done, self.rate)
        return f"{self.what}: {self.done:,} of {self.total:,}  {self.rate:,.0f}/s  {left} left"


class Progress:
    """Counts finished items, and shows a `Counter` at most every UPDATE_SECONDS."""

    def __init__(self, show: Callable[[Counter], None], what: str, total: int, interval: float = UPDATE_SECONDS) -> None:
        """Start counting towards `total`; `what` names the items, e.g. "rows written"; `interval` is in seconds."""
        self._show, self._what, self._total, self._done, self._interval = show, what, total, 0, interval
        self._started = self._reported = time.monotonic()

    def __call__(self, count: int, working_seconds: float | None = None) -> None:
        """Add `count` finished items.

        Args:
            count: number of items since the last call.
            working_seconds: time that all items so far have taken, for the rate; None: the time since construction.
        """
        self._done += count
        now = time.monotonic()
        if now - self._reported < self._interval or not 0 < self._done < self._total:
            return
        self._reported = now
        seconds = now - self._started
        rate = self._done / max(seconds if working_seconds is None else working_seconds, 1e-9)
        self._show(Counter(self._what, self._done, self._total, rate, seconds))


def time_left(remaining: int, rate: float) -> str:
    """Time that `remaining` items take at `rate` items per second, as text: `45 s`, `12 min` or `3.5 h`."""
    seconds = remaining / rate
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def silence_watchdog(say: Callable[[str], None], explain: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """While the block runs, write a line after each SILENCE_SECONDS in which the yielded function was not called.

    Args:
        say: writes a console line; called in a thread of the watchdog.
        explain: says what the cluster is waiting for; called in the same thread. The line is left out if it raises.
    """
    heard, ended = threading.Event(), threading.Event()

    def watch() -> None:
        silent = 0
        while not ended.is_set():
            if heard.wait(SILENCE_SECONDS):
                heard.clear()
                silent = 0
                continue
            silent += SILENCE_SECONDS
            # A cluster that has ended answers with an error of Ray; the run itself fails on it too and reports it.
            with suppress(Exception):
                say(f"no word from the workers for {silent} s: {explain()}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heard.set
    finally:
        ended.set()
        heard.set()
        thread.join()
