"""Console output of a running job, on standard error: lines, and a progress bar on a terminal.

The lines go through the logger "mnistsum_ray", so that a program may redirect them, by other
handlers, or silence them: `logging.getLogger("mnistsum_ray").setLevel("WARNING")`.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO

from tqdm import tqdm

from mnistsum_ray.errors import percent, printable
from mnistsum_ray.storage.uri import hide_secrets

UPDATE_SECONDS: Final = 0.5
"""Minimum time between two updates of progress."""
LINE_SECONDS: Final = 30.0
"""Where there is no bar, progress is a line after this time without a line."""
SILENCE_SECONDS: Final = 60.0
"""Time without a line or progress after which a line says so."""

_LINE: Final = "{desc}: {n:,} of {total:,}{postfix}, {rate_noinv_fmt}, {remaining} left"
_BAR: Final = "{percentage:3.0f}% {bar:16} " + _LINE
"""Formats of tqdm."""


class _Lines(logging.Handler):
    """Writes a line above the progress bar, with the time of day and the run where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        run = getattr(record, "mnistsum_run", "")
        if run:
            text = f"{time.strftime('%H:%M:%S')} {run}  {text}"
        stream = getattr(record, "mnistsum_stream", None) or sys.stderr
        with suppress(OSError):  # the job continues without its terminal
            tqdm.write(text, file=stream)
            stream.flush()


LOG: Final = logging.getLogger("mnistsum_ray")
LOG.setLevel(LOG.level or logging.INFO)
if not LOG.handlers:  # a program has set none
    LOG.addHandler(_Lines())
    LOG.propagate = False  # a program that has set up logging would get each line twice


def shows_bars(stream: TextIO | None = None) -> bool:
    """Return whether progress is a bar: on a terminal, without NO_COLOR, and not in CI."""
    if any(name in os.environ for name in ("NO_COLOR", "CI")):
        return False
    is_silent = not LOG.isEnabledFor(logging.INFO)
    return not is_silent and (stream or sys.stderr).isatty()


class Progress:
    """Counts finished items, and shows how far the work is at most every UPDATE_SECONDS.

    `show` takes `what`, `done` and `total`, as `Console.progress` does, and `Events.count` in a
    training.
    """

    def __init__(self, show: Callable[..., None], what: str, total: int) -> None:
        self._show, self._what, self._total = show, what, total
        self._done = 0
        self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= UPDATE_SECONDS or self._done >= self._total:
            self._shown = now
            self._show(what=self._what, done=self._done, total=self._total)


class Console:
    """Writes lines to standard error: standard output is reserved for the result."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.run = ""
        """Once it is set, each line begins with the time of day and this name."""
        self._stream = stream
        self._last_line_at = self._last_sign_at = time.monotonic()  # a sign: a line, or progress
        self._bar: Any = None  # of tqdm, which is shown on a terminal alone

    @contextmanager
    def waiting_for(self, who: str, explain: Callable[[], str]) -> Iterator[None]:
        """In the block, say on silence what `who` waits for; nothing if `explain` raises."""
        ended = threading.Event()

        def watch() -> None:
            wait = SILENCE_SECONDS
            while not ended.wait(wait):
                silent = time.monotonic() - self._last_sign_at
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
        self._last_sign_at = time.monotonic()
        self._write(text)

    def say_lines(self, text: str) -> None:
        """Write several lines, e.g. an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def _write(self, text: str) -> None:
        extra: dict[str, Any] = {"mnistsum_run": self.run}
        if self._stream:  # a record with a stream cannot go to other processes
            extra["mnistsum_stream"] = self._stream
        LOG.info("%s", printable(hide_secrets(text)), extra=extra)
        self._last_line_at = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far some work is: by a bar on a terminal, else by a line now and then."""
        self._last_sign_at = time.monotonic()
        has_bar = shows_bars(self._stream)
        bar = self._bar
        if bar is None or (bar.desc, bar.total) != (what, total) or done < bar.n:
            self.end_progress()
            if done >= total:  # it was too quick for a bar
                return
            bar = self._bar = tqdm(
                desc=what,
                total=total,
                initial=done,  # the rate is that of what follows
                unit="",
                file=(self._stream or sys.stderr) if has_bar else io.StringIO(),
                bar_format=_BAR if has_bar else _LINE,
                dynamic_ncols=True,
                leave=False,
            )
        bar.n = done
        bar.set_postfix_str(note, refresh=has_bar)
        is_line_due = time.monotonic() - self._last_line_at >= LINE_SECONDS
        if not has_bar and is_line_due and bar.initial < done < total:
            self.say(str(bar))
        if done >= total:
            self.end_progress()

    def end_progress(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe_metrics(metrics: Mapping[str, float | None], *, counts: bool = True) -> str:
    """Return metrics of some rows: `shape 99.46 %, colour 99.27 % (500 rows)`.

    `counts`: show whole numbers, such as rows.
    """
    texts: list[str] = []
    of_counts: list[str] = []
    for name, value in metrics.items():
        if isinstance(value, int):
            of_counts.append(f"{value:,} {name}")
        elif value is not None and name != "loss":
            texts.append(f"{short_name(name)} {metric_value(name, value)}")
    if not texts and metrics.get("loss") is not None:
        texts.append(f"loss {metrics['loss']:.4g}")
    shown = ", ".join(texts)
    return f"{shown} ({', '.join(of_counts)})" if counts and of_counts else shown


def metric_value(name: str, value: float) -> str:
    """Return the value of a metric; names that end in `accuracy` are shown in percent."""
    return percent(value) if name.endswith("accuracy") else f"{value:.4g}"


def short_name(name: str) -> str:
    """`shape` of `shape_accuracy`, and other names as they are."""
    return (name.removesuffix("_accuracy") or name).replace("_", " ")
