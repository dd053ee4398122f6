"""Console output of a running job, on standard error: lines, and below them a progress bar."""

import builtins
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Self, TextIO

from tqdm.auto import tqdm

from mnistsum_ray.errors import percent, printable
from mnistsum_ray.model.heads import HEADS

UPDATE_SECONDS: Final = 2.0
"""Minimum time between two updates of progress."""
LINE_SECONDS: Final = 30.0
"""Where there is no bar, progress is a line after so much time without a line."""
SILENCE_SECONDS: Final = 60.0
"""Time without a line or progress after which a line says so."""

_LINE: Final = "{desc}: {n:,} of {total:,}{postfix}, {rate_fmt}, {remaining} left"
"""Progress as a line, of what tqdm knows."""


class Progress:
    """Counts finished items, and shows how far the work is at most every UPDATE_SECONDS."""

    def __init__(self, show: Callable[..., None], what: str, total: int) -> None:
        """Count towards `total`; `what` names the items; `show` is `Console.progress`."""
        self._show, self._what, self._total = show, what, total
        self._done = 0
        self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        """Add finished items."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= UPDATE_SECONDS or self._done >= self._total:
            self._shown = now
            self._show(what=self._what, done=self._done, total=self._total)


class Console:
    """Writes lines, and below them on a terminal or in a notebook one progress bar.

    A context, at whose end the bar goes away. Standard output is reserved for the result.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.run = ""
        """Once it is set, each line begins with the time of day and this name."""
        self._stream = stream or sys.stderr
        self._has_bars = self._stream.isatty() or hasattr(builtins, "__IPYTHON__")
        self._bar_options: dict[str, Any] = {"file": self._stream, "dynamic_ncols": True}
        if not self._has_bars:  # nobody sees the bar: tqdm only formats the line that says it
            self._bar_options = {"file": io.StringIO(), "bar_format": _LINE}
        self._bar: Any = None
        self._line_time = self._heard = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_bar()

    @contextmanager
    def waiting_for(self, who: str, explain: Callable[[], str]) -> Iterator[None]:
        """In the block, say on silence what `who` waits for; nothing if `explain` raises."""
        ended = threading.Event()

        def watch() -> None:
            wait = SILENCE_SECONDS
            while not ended.wait(wait):
                silent = time.monotonic() - self._heard
                wait = SILENCE_SECONDS - silent
                if wait <= 0:
                    wait = SILENCE_SECONDS
                    with suppress(Exception):  # a cluster that has ended; the run fails on it too
                        self._write(f"no word from {who} for {silent:.0f} s: {explain()}")

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def say(self, text: str) -> None:
        """Write a line."""
        self._heard = time.monotonic()
        self._write(text)

    def say_lines(self, text: str) -> None:
        """Write several lines, e.g. an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def _write(self, text: str) -> None:
        if self.run:
            text = f"{time.strftime('%H:%M:%S')} {self.run}  {text}"
        with suppress(OSError):  # its reader has closed it; the job goes on
            tqdm.write(printable(text), file=self._stream)
            self._stream.flush()
        self._line_time = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far some work is: by a bar of its own, or in a log by a line now and then."""
        self._heard = time.monotonic()
        if done >= total:  # some totals are estimates
            self._close_bar()
            return
        with suppress(OSError):
            bar = self._bar
            if bar is None or (bar.desc, bar.total) != (what, total) or bar.n > done:
                self._close_bar()
                options = self._bar_options | {"total": total, "initial": done}
                self._bar = tqdm(desc=what, leave=False, unit="", disable=False, **options)
            self._bar.n = done
            self._bar.set_postfix_str(note, refresh=self._has_bars)
            if not self._has_bars and self._heard - self._line_time >= LINE_SECONDS:
                self.say(str(self._bar))

    def _close_bar(self) -> None:
        with suppress(OSError):
            if self._bar is not None:
                self._bar.total = self._bar.n  # a notebook's bar that ends before it stays, in red
                self._bar.close()
        self._bar = None


def accuracies(metrics: dict[str, Any]) -> str:
    """Accuracies of all heads: `digit 99.46 %, sum 99.27 %`."""
    return ", ".join(f"{head.name} {percent(metrics[f'{head.name}_accuracy'])}" for head in HEADS)
