"""Progress lines with rate and time left, and a watchdog that reports silence."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

PROGRESS_INTERVAL_SECONDS: Final = 5.0
"""Minimum time between two progress lines."""

SILENCE_SECONDS: Final = 60
"""Time without a sign of life after which `silence_watchdog` writes a line."""


class Progress:
    """Counts finished items and writes their number, the rate and the time left, at most every PROGRESS_INTERVAL_SECONDS.

    Work that finishes within the first interval writes no line at all.
    """

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        """Start counting towards `total`; `what` names the items, e.g. "rows written"."""
        self._say, self._what, self._total, self._done = say, what, total, 0
        self._started = self._reported = time.monotonic()

    def __call__(self, count: int, working_seconds: float | None = None) -> None:
        """Add `count` finished items.

        Args:
            count: number of items since the last call.
            working_seconds: time that all items so far have taken, for the rate; None: the time since construction.
        """
        self._done += count
        now = time.monotonic()
        if now - self._reported < PROGRESS_INTERVAL_SECONDS or not 0 < self._done < self._total:
            return
        self._reported = now
        rate = self._done / max(now - self._started if working_seconds is None else working_seconds, 1e-9)
        left = time_left(self._total - self._done, rate)
        self._say(f"{self._what}: {self._done:,} of {self._total:,}  {rate:,.0f}/s  {left} left")


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
