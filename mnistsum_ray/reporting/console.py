"""Console output of a running job, on standard error: lines, and below them a progress bar."""

import builtins
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Self, TextIO

from mnistsum_ray.errors import percent, printable
from mnistsum_ray.model.heads import HEADS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a notebook without widgets, which gets a bar of text
    from tqdm.auto import tqdm

UPDATE_SECONDS: Final = 2.0
"""Minimum time between two updates of progress."""
LINE_SECONDS: Final = 30.0
"""Where there is no bar, progress is a line after so much time without a line."""
SILENCE_SECONDS: Final = 60.0
"""Time without a line or progress after which a line says so."""


class Progress:
    """Counts finished items, and shows how far the work is at most every UPDATE_SECONDS."""

    def __init__(self, show: Callable[..., None], what: str, total: int) -> None:
        """Count towards `total`; `what` names the items; `show` is `Console.progress`."""
        self._show, self._what, self._total = show, what, total
        self._done = 0
        self._started = self._reported = time.monotonic()

    def __call__(self, count: int, working_seconds: float | None = None) -> None:
        """Add finished items; their rate is over `working_seconds`, or else over all time."""
        self._done += count
        now = time.monotonic()
        if now - self._reported < UPDATE_SECONDS and self._done < self._total:
            return
        self._reported = now
        seconds = now - self._started if working_seconds is None else working_seconds
        rate = self._done / max(seconds, 1e-9)
        self._show(what=self._what, done=self._done, total=self._total, rate=rate)


class Console:
    """Writes lines, and below them on a terminal or in a notebook one progress bar.

    A context, at whose end the bar goes away. Standard output is reserved for the result.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.run = ""
        """Once it is set, each line begins with the time of day and this name."""
        self._stream = stream or sys.stderr
        in_notebook = self._stream is sys.stderr and hasattr(builtins, "__IPYTHON__")
        self._has_bars = self._stream.isatty() or in_notebook
        self._lock = threading.RLock()
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
            while not ended.wait(SILENCE_SECONDS):
                silent = time.monotonic() - self._heard
                if silent >= SILENCE_SECONDS:
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
        with self._lock, suppress(OSError):  # its reader has closed it; the job goes on
            if self._bar is not None:
                self._bar.clear()  # it is drawn again below the line
            self._stream.write(f"{printable(text)}\n")
            self._stream.flush()
        self._line_time = time.monotonic()

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of the training loop, by its `kind`; of other kinds nothing."""
        kind = event["kind"]
        if kind in ("note", "failure"):
            self.say(event["text"])
        elif kind == "counter":
            self.progress(**{key: value for key, value in event.items() if key != "kind"})
        elif kind == "progress":
            epoch, epochs, epoch_rows = event["epoch"], event["epochs"], event["of_rows"]
            done = (epoch - 1) * epoch_rows + event["rows"]
            loss, rate = f"loss {event['loss']:.4f}", event["rows_per_second"]
            self.progress(f"epoch {epoch}/{epochs}, rows", done, epochs * epoch_rows, rate, loss)
        elif kind == "epoch":
            loss, test = f"loss {event['train_loss']:.4f}", f"test {accuracies(event['test'])}"
            rate = f"{event['rows_per_second']:,.0f} rows/s"
            self.say(f"epoch {event['epoch']}: {loss}, {test}, {rate}")

    def progress(self, what: str, done: int, total: int, rate: float, note: str = "") -> None:
        """Show how far some work is: by the bar, or in a log by a line now and then."""
        self._heard = time.monotonic()
        if self._has_bars:
            self._draw(what, done, total, note)
        elif done < total and self._heard - self._line_time >= LINE_SECONDS:
            left = tqdm.format_interval((total - done) / max(rate, 1e-9))
            speed = ", ".join(filter(None, (note, f"{rate:,.0f}/s", f"{left} left")))
            self.say(f"{what}: {done:,} of {total:,}, {speed}")

    def _draw(self, what: str, done: int, total: int, note: str) -> None:
        """Draw the bar. Other work gets a new one, and finished work has none."""
        with self._lock, suppress(OSError):
            if self._bar is None or self._bar.total != total or self._bar.n > done:
                self._close_bar()
                options: dict[str, Any] = {"dynamic_ncols": True, "leave": False, "unit": ""}
                self._bar = tqdm(total=total, initial=done, file=self._stream, **options)
            self._bar.set_description(what, refresh=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.n = done
            self._bar.refresh()
            if done >= total:
                self._close_bar()

    def _close_bar(self) -> None:
        with self._lock, suppress(OSError):
            if self._bar is not None:
                self._bar.total = self._bar.n  # a notebook's bar that ends before it stays, in red
                self._bar.close()
            self._bar = None


def accuracies(metrics: dict[str, Any]) -> str:
    """Accuracies of all heads: `digit 99.46 %, sum 99.27 %`."""
    return ", ".join(f"{head.name} {percent(metrics[f'{head.name}_accuracy'])}" for head in HEADS)
