"""What a person sees while a job runs."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO

from mnistsum_ray.errors import printable

SAY_SECONDS: Final = 5.0
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
        if now - self._said < SAY_SECONDS or not 0 < self._done < self._total:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate
        self._show(f"{self._what}: {self._done:,} of {self._total:,}  {rate:,.0f}/s  {left:,.0f} s left")


def quiet_ray_data() -> None:
    """Keep Ray Data's bars, plans and advice out of sight in this process: the app reports rows, and waits, itself."""
    from ray.data import DataContext  # a second to import

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class Console:
    """Writes events as lines on standard error, which leaves standard output to the result; a live line on a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._open = 0

    def say(self, text: str) -> None:
        """One line that stays."""
        self._write(" " * self._open + "\r" * bool(self._open) + printable(text) + "\n")
        self._open = 0

    def say_lines(self, text: str) -> None:
        """Several lines, such as an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # nobody reads it: what is shown must not decide what is done
            self._stream.write(text)
            self._stream.flush()

    @contextmanager
    def breaking_silence(self, explain: Callable[[], str]) -> Iterator[Callable[[], None]]:
        """While the block runs, say after each minute without a call of what is yielded that nothing is heard, and `explain`."""
        heard, ended = threading.Event(), threading.Event()

        def listen() -> None:
            silent = 0
            while not ended.is_set():
                if heard.wait(SILENCE_SECONDS):
                    heard.clear()
                    silent = 0
                elif not ended.is_set():
                    silent += SILENCE_SECONDS
                    self.say(f"no word from the workers for {silent} s: {explain()}")

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield heard.set
        finally:
            ended.set()
            heard.set()
            thread.join()

    def progress(self, text: str) -> None:
        """One line that the next one writes over, on a terminal; elsewhere it stays too."""
        if self._live:
            self._write(printable(text).ljust(self._open) + "\r")
            self._open = len(printable(text))
        else:
            self.say(text)

    def show(self, event: dict[str, Any]) -> None:
        """One event of the training loop: progress, epoch, or a text, which for a while may be the last."""
        if event["kind"] == "waiting":
            self.progress(event["text"])
        elif event["kind"] == "progress":
            left = (event["of_rows"] - event["rows"]) / event["rows_per_second"]
            in_all = left + (event["epochs"] - event["epoch"]) * event["of_rows"] / event["rows_per_second"]
            self.progress(
                f"epoch {event['epoch']}/{event['epochs']}  {event['rows']:>6,} of {event['of_rows']:,} rows  "
                f"{event['rows_per_second']:,.0f} rows/s  loss {event['loss']:.4f}  {left:.0f} s left in this epoch, "
                f"{f'{in_all:.0f} s' if in_all < 100 else f'{in_all / 60:.0f} min'} in all"
            )
        elif event["kind"] == "epoch":
            self.say(epoch_line(event))
        else:
            self.say(event["text"])


def epoch_line(entry: dict[str, Any]) -> str:
    """The original's figures for one epoch, and the speed."""
    test = entry["test"]
    return (
        f"epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, test loss {test['loss']:.4f}, "
        f"digit {test['digit_accuracy']:.2%}, sum {test['sum_accuracy']:.2%} (all ten numbers), "
        f"{entry['rows_per_second']:,.0f} rows/s, {entry['waiting']:.1%} waiting for data"
        + (", as good as any by validation" if entry["best"] else "")
    )
