"""The signals that stop a job: defer them, and keep their handlers while Ray starts."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """Return the stop signals that are not ignored.

    `nohup` ignores SIGHUP. A shell that runs a script ignores SIGINT for what the script starts with `&`.
    """
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver stop signals to the calling thread only after the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def preserve_signal_handlers() -> Iterator[None]:
    """Defer stop signals while the block runs, and restore their handlers after it. Does nothing outside of the main thread.

    `ray.init` sets two handlers for SIGTERM, one of which ends in a C++ stack trace. An exception in the middle of `ray.init`
    leaves processes behind or ends in a segmentation fault.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []  # signals that were delivered to another thread; the mask of this one does not defer those
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in handled_signals():
        signal.signal(number, lambda number, _: caught.append(number))
    set_handler = signal.signal

    def keep_handler(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in STOP_SIGNALS else set_handler(number, handler)

    with defer_signals():
        signal.signal = keep_handler  # type: ignore[assignment]
        try:
            yield
        finally:
            signal.signal = set_handler
            for number, handler in before.items():
                signal.signal(number, handler)  # also replaces a handler that C++ has set, of which Python knows nothing
    if caught:
        signal.raise_signal(caught[0])
