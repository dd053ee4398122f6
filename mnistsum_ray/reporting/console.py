"""Console output of a running job: lines on standard error, and a progress bar on a terminal or in a notebook."""

import sys
import threading
from contextlib import suppress
from typing import Any, Final, Self, TextIO

from mnistsum_ray.errors import printable
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.progress import Counter, time_left
from mnistsum_ray.reporting.progress_bar import ProgressBar, can_show_bars

_LINE_SECONDS: Final = 5.0
"""Time between two progress lines of the same work, where there is no bar. Work that ends sooner has none."""


class Console:
    """Writes lines to standard error; standard output is reserved for the result. A context, at whose end the bar goes away."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.RLock()
        self._bar = ProgressBar(self._stream) if can_show_bars(self._stream) else None
        self._training: dict[str, Any] | None = None
        """The latest progress event of the epochs, whose bar stays while something else is counted."""
        self._shown: dict[str, float] = {}
        """When each kind of work had its last progress line, in seconds since it began."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with self._lock, suppress(OSError):
                self._bar.close()

    def say(self, text: str) -> None:
        """Write a line."""
        with self._lock, suppress(OSError):  # standard error was closed by its reader; the job goes on
            if self._bar:
                self._bar.write(f"{printable(text)}\n")
            else:
                self._stream.write(f"{printable(text)}\n")
                self._stream.flush()

    def say_lines(self, text: str) -> None:
        """Write several lines, e.g. an error of Ray with its traceback."""
        for line in text.splitlines():
            self.say(line)

    def progress(self, counter: Counter) -> None:
        """Show how far some work is: by the bar, or in a log by a line every 5 s."""
        if not self._bar:
            self._say_sometimes(counter.what, counter.seconds, str(counter))
            return
        with self._lock, suppress(OSError):
            if self._training:
                done = f"{counter.what}: {counter.done:,} of {counter.total:,}"
                self._show_epochs(self._training, done)
            else:
                self._bar.show(counter.what, counter.what, counter.done, counter.total, f"{counter.rate:,.0f}/s")

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of the training loop. `kind` is progress (of an epoch), epoch, counter, or note (a line)."""
        if event["kind"] == "counter":
            self.progress(Counter(**{key: value for key, value in event.items() if key != "kind"}))
        elif event["kind"] == "progress":
            self._show_progress(event)
        elif event["kind"] == "epoch":
            self.say(epoch_line(event))
        else:
            self.say(event["text"])

    def _show_progress(self, event: dict[str, Any]) -> None:
        rate, rows_left = event["rows_per_second"], event["of_rows"] - event["rows"]
        all_rows_left = rows_left + (event["epochs"] - event["epoch"]) * event["of_rows"]
        if self._bar:
            with self._lock, suppress(OSError):
                if all_rows_left:
                    self._training = event
                    self._show_epochs(event, f"{rate:,.0f} rows/s, loss {event['loss']:.4f}")
                else:  # what follows has bars of its own
                    self._training = None
                    self._bar.close()
            return
        text = (
            f"epoch {event['epoch']}/{event['epochs']}  {event['rows']:>6,} of {event['of_rows']:,} rows  "
            f"{rate:,.0f} rows/s  loss {event['loss']:.4f}  {time_left(rows_left, rate)} left in this epoch, "
            f"{time_left(all_rows_left, rate)} in all"
        )
        self._say_sometimes(f"epoch {event['epoch']}", event["seconds"], text)

    def _show_epochs(self, event: dict[str, Any], postfix: str) -> None:
        """The bar of the run: rows of all epochs."""
        assert self._bar
        rows = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
        self._bar.show("epochs", f"epoch {event['epoch']}/{event['epochs']}", rows, event["epochs"] * event["of_rows"], postfix)

    def _say_sometimes(self, what: str, seconds: float, text: str) -> None:
        with self._lock:
            last = self._shown.get(what, 0.0)
            last = last if last <= seconds else 0.0  # the same kind of work once more
            if seconds - last < _LINE_SECONDS:
                return
            self._shown[what] = seconds
            self.say(text)


def epoch_line(entry: dict[str, Any]) -> str:
    """Console line of an epoch: losses, test accuracies (in the original's units) and speed."""
    test = entry["test"]
    accuracies = ", ".join(f"{head.name} {test[f'{head.name}_accuracy']:.2%}" for head in HEADS)
    return (
        f"epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, test loss {test['loss']:.4f}, "
        f"{accuracies} (all ten numbers), "
        f"{entry['rows_per_second']:,.0f} rows/s, {entry['waiting']:.1%} waiting for data"
    )
