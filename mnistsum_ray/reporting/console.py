"""Console output of a running job: lines on standard error, and a live progress line on a terminal."""

import sys
from contextlib import suppress
from typing import Any, TextIO

from mnistsum_ray.errors import printable
from mnistsum_ray.reporting.progress import time_left


class Console:
    """Writes lines to standard error; standard output is reserved for the result."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._live_width = 0

    def say(self, text: str) -> None:
        """Write a line; on a terminal it replaces the live progress line."""
        self._write(" " * self._live_width + "\r" * bool(self._live_width) + printable(text) + "\n")
        self._live_width = 0

    def say_lines(self, text: str) -> None:
        """Write several lines, e.g. an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # standard error was closed by its reader; the job goes on
            self._stream.write(text)
            self._stream.flush()

    def progress(self, text: str) -> None:
        """Write a progress line. On a terminal the next line overwrites it; in a log file it stays."""
        if self._is_terminal:
            self._write(printable(text).ljust(self._live_width) + "\r")
            self._live_width = len(printable(text))
        else:
            self.say(text)

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of the training loop. `kind` is progress, epoch, counter (a progress line) or note (a line)."""
        if event["kind"] == "counter":
            self.progress(event["text"])
        elif event["kind"] == "progress":
            rate, rows_left = event["rows_per_second"], event["of_rows"] - event["rows"]
            all_rows_left = rows_left + (event["epochs"] - event["epoch"]) * event["of_rows"]
            self.progress(
                f"epoch {event['epoch']}/{event['epochs']}  {event['rows']:>6,} of {event['of_rows']:,} rows  "
                f"{rate:,.0f} rows/s  loss {event['loss']:.4f}  {time_left(rows_left, rate)} left in this epoch, "
                f"{time_left(all_rows_left, rate)} in all"
            )
        elif event["kind"] == "epoch":
            self.say(epoch_line(event))
        else:
            self.say(event["text"])


def epoch_line(entry: dict[str, Any]) -> str:
    """Console line of an epoch: losses, test accuracies (in the original's units) and speed."""
    test = entry["test"]
    return (
        f"epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, test loss {test['loss']:.4f}, "
        f"digit {test['digit_accuracy']:.2%}, sum {test['sum_accuracy']:.2%} (all ten numbers), "
        f"{entry['rows_per_second']:,.0f} rows/s, {entry['waiting']:.1%} waiting for data"
        + (", selected by validation" if entry["best"] else "")
    )
