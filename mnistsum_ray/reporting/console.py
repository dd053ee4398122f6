"""Console output of a running job, on standard error: lines, and below them a progress bar.

The lines go through the logger "mnistsum_ray", so that a program may redirect them, by other
handlers, or silence them and the bar: `logging.getLogger("mnistsum_ray").setLevel("WARNING")`.
"""

import builtins
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, TextIO

from tqdm.auto import tqdm

from mnistsum_ray.errors import percent, printable
from mnistsum_ray.storage.uri import hide_secrets

UPDATE_SECONDS: Final = 2.0
"""Minimum time between two updates of progress."""
LINE_SECONDS: Final = 30.0
"""Where there is no bar, progress is a line after so much time without a line."""
SILENCE_SECONDS: Final = 60.0
"""Time without a line or progress after which a line says so."""

_LINE: Final = "{desc}: {n:,} of {total:,}{postfix}, {rate_fmt}, {remaining} left"


class _AboveTheBar(logging.Handler):
    """Writes a line above any progress bar, with the time of day and the run where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        run = getattr(record, "mnistsum_run", "")
        stream = getattr(record, "mnistsum_stream", None) or sys.stderr
        if run:
            text = f"{time.strftime('%H:%M:%S')} {run}  {text}"
        with suppress(OSError, ValueError):  # where stream or reader is closed, the job goes on
            if stream is not None:
                tqdm.write(text, file=stream)
                stream.flush()


LOG: Final = logging.getLogger("mnistsum_ray")
LOG.setLevel(LOG.level or logging.INFO)
if not LOG.handlers:  # a program has set none
    LOG.addHandler(_AboveTheBar())
    LOG.propagate = False  # a program that has set up logging would get each line twice


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


class Console(AbstractContextManager["Console"]):
    """Writes lines, and below them on a terminal or in a notebook one progress bar.

    A context, at whose end the bar goes away. Standard output is reserved for the result.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.run = ""
        """Once it is set, each line begins with the time of day and this name."""
        self._stream = stream or sys.stderr
        is_terminal = self._stream is not None and self._stream.isatty()
        is_shown = is_terminal or hasattr(builtins, "__IPYTHON__")
        self._has_bars = is_shown and LOG.isEnabledFor(logging.INFO)
        self._bar: Any = None
        self._last_line_at = self._last_sign_at = time.monotonic()  # a sign: a line, or progress

    def __exit__(self, *_: object) -> None:
        self._close_bar()

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
        if self._stream is not sys.stderr:  # a record with a stream cannot go to other processes
            extra["mnistsum_stream"] = self._stream
        LOG.info("%s", printable(hide_secrets(text)), extra=extra)
        self._last_line_at = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far some work is: by a bar of its own, or in a log by a line now and then."""
        self._last_sign_at = time.monotonic()
        bar = self._bar
        is_new = bar is None or (bar.desc, bar.total) != (what, total) or done < bar.n
        if done >= total:  # some totals are estimates
            self._close_bar()
        elif is_new:
            self._close_bar()
            self._open_bar(what, done, total, note)
        else:
            bar.n = done
            # Below 1 a second tqdm writes `2.00s/item`, and without a unit `2.00s/`.
            bar.unit = "item" if done - bar.initial < time.time() - bar.start_t else ""
            with suppress(OSError):
                bar.set_postfix_str(note, refresh=self._has_bars)
            is_due = time.monotonic() - self._last_line_at >= LINE_SECONDS
            if is_due and not self._has_bars and done > bar.initial:  # at first the rate is unknown
                self.say(str(bar))

    def _open_bar(self, what: str, done: int, total: int, note: str) -> None:
        # In a log the bar is not shown: `progress` writes its text as a line.
        file, bar_format = (self._stream, None) if self._has_bars else (io.StringIO(), _LINE)
        options: dict[str, Any] = {"desc": what, "total": total, "initial": done, "unit": ""}
        options |= {"file": file, "bar_format": bar_format, "postfix": note}
        with suppress(OSError):
            self._bar = tqdm(leave=False, dynamic_ncols=True, disable=False, **options)

    def _close_bar(self) -> None:
        with suppress(OSError):
            if self._bar is not None:
                self._bar.total = self._bar.n  # a notebook keeps a bar that ends below it, in red
                self._bar.close()
        self._bar = None


def describe_metrics(metrics: Mapping[str, float | None], *, counts: bool = True) -> str:
    """Metrics of some rows: `shape 99.46 %, colour 99.27 % (500 rows)`.

    Names that end in `accuracy` are shown in percent. `counts`: show whole numbers, such as rows.
    """
    texts: list[str] = []
    of_counts: list[str] = []
    for name, value in metrics.items():
        if isinstance(value, int):
            of_counts.append(f"{value:,} {name}")
        elif value is not None and name != "loss":
            texts.append(metric_text(name, value))
    if not texts and metrics.get("loss") is not None:
        texts.append(f"loss {metrics['loss']:.4g}")
    shown = ", ".join(texts)
    return f"{shown} ({', '.join(of_counts)})" if counts and of_counts else shown


def metric_text(name: str, value: float) -> str:
    """One metric with its short name, such as `shape 99.46 %` of `shape_accuracy`."""
    return f"{short_name(name)} {metric_value(name, value)}"


def metric_value(name: str, value: float) -> str:
    return percent(value) if name.endswith("accuracy") else f"{value:.4g}"


def short_name(name: str) -> str:
    """`shape` of `shape_accuracy`, and other names as they are."""
    return (name.removesuffix("_accuracy") or name).replace("_", " ")
