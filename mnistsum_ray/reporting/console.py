"""What a person sees while a job runs."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from mnistsum_ray.errors import printable
from mnistsum_ray.reporting.progress import SILENCE_SECONDS


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
