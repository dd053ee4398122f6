"""Console output of a running job: lines and progress on standard error, and a watchdog that reports silence."""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Self, TextIO

from mnistsum_ray.errors import percent, printable
from mnistsum_ray.model.heads import HEADS

UPDATE_SECONDS: Final = 2.0
"""Minimum time between two updates of progress."""

SILENCE_SECONDS: Final = 60
"""Time without a line or progress after which a line says so."""

_LINE_SECONDS: Final = 5.0
"""Where there is no bar, progress is a line after so much time without a line."""

_WAITING: Final = 0.1
"""Fraction of an epoch without data from which a line says so."""


class Progress:
    """Counts finished items, and shows how far the work is at most every UPDATE_SECONDS."""

    def __init__(self, show: Callable[..., None], what: str, total: int) -> None:
        """Count towards `total`; `what` names the items, e.g. "rows written"; `show` is `Console.progress`."""
        self._show, self._what, self._total = show, what, total
        self._done = 0
        self._started = self._reported = time.monotonic()

    def __call__(self, count: int, working_seconds: float | None = None) -> None:
        """Add `count` finished items. The rate is over `working_seconds`, if given, or else over the time since construction."""
        self._done += count
        now = time.monotonic()
        if now - self._reported < UPDATE_SECONDS and self._done < self._total:
            return
        self._reported = now
        seconds = now - self._started if working_seconds is None else working_seconds
        self._show(what=self._what, done=self._done, total=self._total, rate=self._done / max(seconds, 1e-9))


def time_left(remaining: int, rate: float) -> str:
    """Time that `remaining` items take at `rate` items per second, as text: `45 s`, `12 min` or `3.5 h`."""
    seconds = remaining / rate
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Console:
    """Writes lines to standard error, and below them on a terminal or in a notebook one progress bar.

    Standard output is reserved for the result. A context: no step in it is silent for long, and the bar goes away at its end.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.RLock()
        self._has_bars = self._stream.isatty() or (self._stream is sys.stderr and "ipykernel" in sys.modules)
        self._bar: Any = None
        self._line_time = time.monotonic()
        """When the latest line was written."""
        self._waiting: tuple[str, Callable[[], str]] = ("this step", lambda: "it is large, or the storage is slow")
        self._heard, self._ended = threading.Event(), threading.Event()
        self._watchdog = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heard.set()
        self._watchdog.join()
        self._close_bar()

    @contextmanager
    def waiting_for(self, who: str, explain: Callable[[], str]) -> Iterator[None]:
        """While the block runs, a line on silence names `who`, and what they wait for. It is left out if `explain` raises."""
        before, self._waiting = self._waiting, (who, explain)
        try:
            yield
        finally:
            self._waiting = before

    def _watch(self) -> None:
        silent = 0.0
        while not self._ended.is_set():
            if self._heard.wait(SILENCE_SECONDS):
                self._heard.clear()
                silent = 0
                continue
            silent += SILENCE_SECONDS
            who, explain = self._waiting
            # A cluster that has ended answers with an error of Ray; the run itself fails on it too and reports it.
            with suppress(Exception):
                self._write(f"no word from {who} for {silent:g} s: {explain()}")

    def say(self, text: str) -> None:
        """Write a line."""
        self._heard.set()
        self._write(text)

    def _write(self, text: str) -> None:
        line = f"{printable(text)}\n"
        with self._lock, suppress(OSError):  # standard error was closed by its reader; the job goes on
            if self._bar is None:
                self._stream.write(line)
            else:
                self._bar.write(line, file=self._stream, end="")
            self._stream.flush()
        self._line_time = time.monotonic()

    def say_lines(self, text: str) -> None:
        """Write several lines, e.g. an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of the training loop, whose `kind` is progress (of an epoch), epoch, counter, or note (a line).

        question is the driver's.
        """
        fields = {key: value for key, value in event.items() if key != "kind"}
        if event["kind"] == "counter":
            self.progress(**fields)
        elif event["kind"] == "progress":
            self._show_training(fields)
        elif event["kind"] == "epoch":
            self._say_epoch(fields)
        elif event["kind"] == "note":
            self.say(event["text"])

    def progress(self, what: str, done: int, total: int, rate: float) -> None:
        """Show how far some work is, at `rate` items per second: by the bar, or in a log by a line now and then."""
        self._heard.set()
        if self._has_bars:
            self._draw(what, done, total)
        elif 0 < done < total:
            self._say_sometimes(f"{what}: {done:,} of {total:,}  {rate:,.0f}/s  {time_left(total - done, rate)} left")

    def _show_training(self, event: dict[str, Any]) -> None:
        """Show how far the run is; its bar counts the rows of all epochs."""
        self._heard.set()
        epoch, rate, loss = f"epoch {event['epoch']}/{event['epochs']}", event["rows_per_second"], f"loss {event['loss']:.4f}"
        all_rows, rows_left = event["epochs"] * event["of_rows"], event["of_rows"] - event["rows"]
        all_rows_left = rows_left + (event["epochs"] - event["epoch"]) * event["of_rows"]
        if self._has_bars:
            self._draw(epoch, all_rows - all_rows_left, all_rows, loss)
        elif rows_left:  # else the line of the epoch comes at once
            self._say_sometimes(
                f"{epoch}  {event['rows']:>6,} of {event['of_rows']:,} rows  {rate:,.0f} rows/s  {loss}  "
                f"{time_left(rows_left, rate)} left in this epoch, {time_left(all_rows_left, rate)} in all"
            )

    def _say_epoch(self, entry: dict[str, Any]) -> None:
        """Say loss, test accuracies and speed, in up to 80 columns; and waiting after the first batch."""
        epoch, loss, rate = f"epoch {entry['epoch']}", entry["train_loss"], entry["rows_per_second"]
        self.say(f"{epoch}: loss {loss:.4f}, test {accuracies(entry['test'])}, {rate:,.0f} rows/s")
        waiting = entry["waiting"] - entry["first_batch_seconds"] / entry["seconds"]
        if waiting > _WAITING:
            self.say(f"{epoch}: the workers waited for data {percent(waiting)} of the time")

    def _draw(self, description: str, done: int, total: int, postfix: str = "") -> None:
        """Draw the bar, with a text before it and one after it; other work gets a new one, and finished work has none."""
        with self._lock, suppress(OSError):
            if self._bar is None or self._bar.total != total or self._bar.n > done:
                self._close_bar()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a notebook without widgets, which gets a bar of text
                    from tqdm.auto import tqdm
                self._bar = tqdm(total=total, initial=done, file=self._stream, dynamic_ncols=True, leave=False, unit="")
            self._bar.set_description(description, refresh=False)
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.n = done
            self._bar.refresh()
            if done >= total:
                self._close_bar()

    def _close_bar(self) -> None:
        with self._lock, suppress(OSError):
            if self._bar is not None:
                self._bar.total = self._bar.n  # a bar of a notebook that ends before its total stays, in red
                self._bar.close()
            self._bar = None

    def _say_sometimes(self, text: str) -> None:
        if time.monotonic() - self._line_time >= _LINE_SECONDS:
            self.say(text)


def accuracies(metrics: dict[str, Any]) -> str:
    """Accuracies of all heads: `digit 99.46 %, sum 99.27 %`."""
    return ", ".join(f"{head.name} {percent(metrics[f'{head.name}_accuracy'])}" for head in HEADS)
