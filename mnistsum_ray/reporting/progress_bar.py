"""One progress bar, on a terminal or in a notebook."""

import sys
import warnings
from typing import Any, Final, TextIO

_FORMAT: Final = "{desc} {percentage:3.0f}% |{bar}| {n:,} of {total:,}{postfix}, {remaining} left"


def can_show_bars(stream: TextIO) -> bool:
    """Return whether a bar can be drawn: on a terminal, and on a notebook's standard error."""
    return stream.isatty() or (stream is sys.stderr and "ipykernel" in sys.modules)


class ProgressBar:
    """A bar of tqdm that fits the width of the terminal. Lines are written above it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None

    def show(self, key: str, description: str, done: int, total: int, postfix: str = "") -> None:
        """Show how far the work is.

        Args:
            key: names the work; with another key the bar starts anew.
            description: text before the bar.
            done: finished items.
            total: all items.
            postfix: text after the numbers.
        """
        if self._bar is None or self._bar.key != key or self._bar.n > done:
            self.close()
            self._bar = _make_bar(self._stream, done, total)
            self._bar.key = key
        self._bar.set_description_str(description, refresh=False)
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        if self._bar is None:
            self._stream.write(text)
        else:
            self._bar.write(text, file=self._stream, end="")
        self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            # The last step is not always counted, and a bar of a notebook that ends before its total stays, in red.
            self._bar.total = self._bar.n
            self._bar.close()
            self._bar = None


def _make_bar(stream: TextIO, done: int, total: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets, which gets a bar of text
        from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, file=stream, dynamic_ncols=True, leave=False, mininterval=0, bar_format=_FORMAT)
