"""Stop a job in order on SIGINT, SIGTERM or SIGHUP, and keep these signals from code that must not stop."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REPEAT_SECONDS: Final = 5.0
"""Seconds until KeyboardInterrupt is raised a second time: one that is raised in a finalizer or a callback of C++ is lost."""

_STOP_SECONDS: Final = 10.0
"""Seconds after that until the process is ended. Where Ray's server has had the signal too, as
from `timeout` or a closed terminal, its calls would wait for a minute."""

_DISCONNECT_SECONDS: Final = 20.0
"""Longest time for disconnecting and leaving the interpreter. A cluster of this process ends with it."""


class StopOnSignals:
    """Context in which a stop signal raises KeyboardInterrupt in the main thread; after `end` it exits the process at once.

    A process that has not stopped 15 s after the signal is ended, and `say` writes why: C++ may
    hold the main thread for long.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._say = say
        self._ended = threading.Event()
        self._raised_at = float("-inf")
        self._exit_code = 0

    def __enter__(self) -> "StopOnSignals":
        # A signal's number is written to this pipe when it arrives, even if the main thread never runs the Python handler.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._receive) for number in _handled_signals()}
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ended.is_set():  # the handlers stay until the process has exited: the interpreter takes a moment for it
            return
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)

    @property
    def exit_code(self) -> int:
        """Exit code by the shells' convention: 128 plus the number of the signal."""
        return 128 + (self.received or signal.SIGINT)

    def end(self, exit_code: int) -> None:
        """Declare that the job is over: from here on a signal exits with this code, and so does a disconnect of over 20 s."""
        if self._ended.is_set():
            return
        self._exit_code = exit_code
        self._ended.set()
        timer = threading.Timer(_DISCONNECT_SECONDS, os._exit, (exit_code,))
        timer.daemon = True
        timer.start()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._ended.is_set():
            os._exit(self._exit_code)
        self.received = self.received or signal.Signals(number)
        # A second signal of an impatient user must not interrupt the cleanup that the first one has begun.
        if time.monotonic() - self._raised_at >= _REPEAT_SECONDS / 2:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        """Thread that ends the process if a signal has not ended the job."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the main thread receives them
        while (arrived := os.read(pipe, 1)[0]) not in self._handlers_before:
            pass  # another signal for which Python has a handler
        if self._ended.wait(_REPEAT_SECONDS):
            return
        os.kill(os.getpid(), arrived)
        if not self._ended.wait(_STOP_SECONDS):
            name = signal.Signals(arrived).name
            how = "the same command goes on (train: with --resume)"
            self._say(f"stopped by {name}; ended after 15 s; what has been saved is kept, and {how}")
            os._exit(128 + arrived)


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Deliver stop signals that arrive in the block after it, each once, in order. Does nothing outside of the main thread.

    A mask is that of one thread, and Python runs a handler in the main thread whichever has taken the signal. So the handlers
    are replaced. Yields the signals that have arrived.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        for number in _handled_signals():
            signal.signal(number, lambda number, _: caught.append(number))
        yield caught
    finally:
        _restore_handlers(before)
        with ExitStack() as arrived:  # the second is raised also if the handler of the first raises
            for number in reversed(dict.fromkeys(caught)):
                arrived.callback(signal.raise_signal, number)


def _restore_handlers(handlers: dict[signal.Signals, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # also replaces a handler that C++ has set, of which Python knows nothing
    except BaseException:  # of a handler that is back already, since its signal has just arrived
        _restore_handlers(handlers)
        raise


@contextmanager
def preserve_signal_handlers() -> Iterator[None]:
    """Defer stop signals while `ray.init` runs in the block, and restore their handlers after it.

    It sets two for SIGTERM, and an exception in its middle may end in a segmentation fault.
    """
    with defer_signals() as caught:
        try:
            yield
        except SystemExit:  # of Ray's own handler of SIGTERM
            signal.alarm(0)  # that of Ray's C++ has set one, which aborts the process 3 s later
            caught.append(signal.SIGTERM)
            raise


def _handled_signals() -> list[signal.Signals]:
    """The stop signals that are not ignored: `nohup` ignores SIGHUP, a script's shell SIGINT for what it starts with `&`."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
