"""TODO reporting.progress"""

import time
from collections.abc import Callable
from typing import Final

PROGRESS_INTERVAL_SECONDS: Final = 5.0
"""Least time between two lines of progress."""

SILENCE_SECONDS: Final = 60
"""After so long without a word from the workers, a person is told what the cluster looks like."""


class Progress:
    """Says how far something is that takes a while, with rate and time left; nothing of what is done sooner."""

    def __init__(self, show: Callable[[str], None], what: str, total: int) -> None:
        """`show` takes a line; `what` is counted, up to `total`."""
        self._show, self._what, self._total, self._done = show, what, total, 0
        self._started = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said < PROGRESS_INTERVAL_SECONDS or not 0 < self._done < self._total:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate
        self._show(f"{self._what}: {self._done:,} of {self._total:,}  {rate:,.0f}/s  {left:,.0f} s left")
