"""Stop a job in order on SIGINT, SIGTERM or SIGHUP; and hold these signals off for a moment."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REPEAT_SECONDS: Final = 2.0
"""A signal so soon after another is the same one: `timeout` and terminals send it twice."""

_STOP_SECONDS: Final = 15.0
"""Longest time for stopping. Where Ray's server has had the signal too, its calls wait a minute."""

_DISCONNECT_SECONDS: Final = 20.0
"""Longest time for leaving the interpreter. A cluster of this process ends with it."""


class StopOnSignals:
    """From here on a stop signal raises KeyboardInterrupt; after `end` it exits at once.

    A process that has not stopped 15 s after the signal is ended, and `say` writes why.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._say = say
        self._raised_at = 0.0
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._exit_code = 0

    def __enter__(self) -> "StopOnSignals":
        for number in _handled():
            signal.signal(number, self._receive)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """The handlers stay until the process has exited."""

    @property
    def exit_code(self) -> int:
        """Exit code by the shells' convention: 128 plus the number of the signal."""
        return 128 + (self.received or signal.SIGINT)

    def end(self, exit_code: int) -> None:
        """Declare that the job is over: a signal, or 20 s, now exit with this code."""
        if not self._ended.is_set():
            self._exit_code = exit_code
            self._ended.set()
            self._stopping.set()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._ended.is_set():
            os._exit(self._exit_code)
        now = time.monotonic()
        if self.received and now - self._raised_at < _REPEAT_SECONDS:
            return
        self.received = self.received or signal.Signals(number)
        self._raised_at = now
        self._stopping.set()
        raise KeyboardInterrupt

    def _watch(self) -> None:
        self._stopping.wait()
        if not self._ended.wait(_STOP_SECONDS):
            name = signal.Signals(self.exit_code - 128).name
            how = "the same command goes on (train: with --resume)"
            self._say(f"stopped by {name}; ended after 15 s; what has been saved is kept, and {how}")
            os._exit(self.exit_code)
        time.sleep(_DISCONNECT_SECONDS)
        os._exit(self._exit_code)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver a stop signal that arrives in the block after it. Only the main thread gets any.

    The handlers are restored: `ray.init` sets others for SIGTERM, and an exception in its middle
    may end in a segmentation fault.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in _handled()}
    for number in before:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield
    except SystemExit:  # of Ray's handler of SIGTERM
        signal.alarm(0)  # that of Ray's C++ has set one, which aborts the process 3 s later
        caught.append(signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def _handled() -> list[signal.Signals]:
    """The stop signals that are not ignored: `nohup` ignores SIGHUP, a script's `&` SIGINT."""
    ignored = (signal.SIG_IGN, None)
    return [number for number in STOP_SIGNALS if signal.getsignal(number) not in ignored]
