"""What a person sees and what is left to look at: lines while it trains, history.jsonl, pictures."""

import io
import json
import logging
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final, TextIO

from mnistsum_ray import __version__
from mnistsum_ray.storage import Location

SILENCE_SECONDS: Final = 60
"""After so long without a word from the workers, a person is told what the cluster looks like."""


def quiet_ray_data() -> None:
    """Keep Ray Data's bars, plans and advice out of sight in this process: the app reports rows, and waits, itself."""
    from ray.data import DataContext  # a second to import

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class Console:
    """Writes events as lines on standard error, which leaves standard output to the result; a live line on a terminal."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._open = 0

    def say(self, text: str) -> None:
        """One line that stays."""
        self._stream.write(" " * self._open + "\r" * bool(self._open) + text + "\n")
        self._stream.flush()
        self._open = 0

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
            self._stream.write(text.ljust(self._open) + "\r")
            self._stream.flush()
            self._open = len(text)
        else:
            self.say(text)

    def show(self, event: dict[str, Any]) -> None:
        """One event of the training loop: progress, epoch or note."""
        if event["kind"] == "progress":
            left = (event["of_rows"] - event["rows"]) / event["rows_per_second"]
            self.progress(
                f"epoch {event['epoch']}/{event['epochs']}  {event['rows']:>6,} of {event['of_rows']:,} rows  "
                f"{event['rows_per_second']:,.0f} rows/s  loss {event['loss']:.4f}  {left:.0f} s left in this epoch"
            )
        elif event["kind"] == "epoch":
            self.say(epoch_line(event))
        else:
            self.say(event["text"])


def versions() -> dict[str, str]:
    """What a manifest says of the software that made it."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__, **packages}


def epoch_line(entry: dict[str, Any]) -> str:
    """The original's figures for one epoch, and the speed."""
    test = entry["test"]
    return (
        f"epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, test loss {test['loss']:.4f}, "
        f"digit {test['digit_accuracy']:.2%}, sum {test['sum_accuracy']:.2%} (all ten numbers), "
        f"{entry['rows_per_second']:,.0f} rows/s, {entry['waiting']:.1%} waiting for data"
        + (", best so far by validation" if entry["best"] else "")
    )


def write_history(run: Location, history: Iterable[dict[str, Any]]) -> None:
    """`history.jsonl`: one line an epoch."""
    (run / "history.jsonl").write_bytes("".join(json.dumps(entry) + "\n" for entry in history).encode())


def draw_history(run: Location, history: list[dict[str, Any]]) -> None:
    """`history.png`: loss and accuracy by epoch."""
    from matplotlib.figure import Figure  # a second to import, needed once

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", label="train")
    losses.plot(epochs, [entry["test"]["loss"] for entry in history], "o-", label="test")
    losses.set(title="loss (mean of both heads, nats)", xlabel="epoch", yscale="log")
    accuracies.plot(epochs, [100 * entry["test"]["digit_accuracy"] for entry in history], "o-", label="digit")
    accuracies.plot(epochs, [100 * entry["test"]["sum_accuracy"] for entry in history], "o-", label="sum")
    accuracies.set(title="test accuracy, % (sum: all ten numbers)", xlabel="epoch")
    for axes in (losses, accuracies):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    (run / "history.png").write_bytes(picture.getvalue())
