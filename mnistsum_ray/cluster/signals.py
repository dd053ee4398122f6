"""SIGINT, SIGTERM and SIGHUP end a job in order: it stops where it is, says what goes on, and leaves no process behind."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_AGAIN_SECONDS: Final = 5.0
"""An exception that is raised in a callback of C++ is lost; then it is raised once more."""

_STOP_SECONDS: Final = 25.0
_LEAVE_SECONDS: Final = 20.0
"""After so long nothing is waited for any more: what is left of a cluster of its own the reaper ends."""

_POLL_SECONDS: Final = 0.5
_SOON_SECONDS: Final = 0.1


def _handled() -> list[signal.Signals]:
    """Those that are not ignored: `nohup` ignores SIGHUP, a script's shell SIGINT for what it starts with `&`."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class StopOnSignals:
    """While it is entered, a signal raises KeyboardInterrupt in the main thread; once the job is over, it ends the process.

    A process that has not stopped after half a minute is ended, and `say` told so: C++ may keep the main thread for long.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._say = say
        self._ending = threading.Event()
        self._raised = float("-inf")
        self._code = 0

    def __enter__(self) -> "StopOnSignals":
        self._pipe = os.pipe()  # is written when a signal arrives, even if the main thread never comes to its handler
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._receive) for number in _handled()}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ending.is_set():  # until the very end, since the interpreter takes a moment to end
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        sys.unraisablehook = self._hook

    @property
    def exit_code(self) -> int:
        """As shells have it: 128 and the signal's number."""
        return 128 + (self.received or signal.SIGINT)

    def end(self, code: int) -> None:
        """The job is over with this exit code, but for leaving the cluster, which is not waited for without end."""
        if self._ending.is_set():
            return
        self._code = code
        self._ending.set()
        threading.Thread(target=self._exit_after, args=(_LEAVE_SECONDS,), daemon=True).start()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._ending.is_set():
            os._exit(self._code)
        self.received = self.received or signal.Signals(number)
        if time.monotonic() - self._raised >= _AGAIN_SECONDS / 2:  # an impatient second one must not break the end of the first
            self._raised = time.monotonic()
            raise KeyboardInterrupt

    def _unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        """Raise the interrupt once more if that was lost: in a finalizer, or in the callback of a weak reference."""
        if self.received is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook(lost)
            return
        self._raised = float("-inf")
        threading.Timer(_SOON_SECONDS, os.kill, (os.getpid(), self.received)).start()

    def _watch(self, pipe: int) -> None:
        """See to it that a signal ends the job."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are the main thread's
        arrived = None
        while arrived is None:
            if self._ending.is_set():
                return
            written = os.read(pipe, 1) if select.select([pipe], [], [], _POLL_SECONDS)[0] else b""
            arrived = next((number for number in (*written, *signal.sigpending()) if number in self._before), None)
        if self._ending.wait(_AGAIN_SECONDS):
            return
        os.kill(os.getpid(), arrived)
        if not self._ending.wait(_STOP_SECONDS):
            name = signal.Signals(arrived).name
            self._say(f"stopped by {name}; ended, since it had not stopped after 30 s; what is saved stays")
            os._exit(128 + arrived)

    def _exit_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os._exit(self._code)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """While the block runs, signals to the main thread wait for its end."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def handlers_preserved() -> Iterator[None]:
    """While the block runs, signals wait for its end, and the handlers stay those that were there before.

    `ray.init` sets two handlers for SIGTERM, one of which ends in a C++ stack trace; and an exception in the middle of it leaves
    processes behind or ends in a segmentation fault. Does nothing in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []  # those that another thread has caught; the others wait by themselves
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in _handled():
        signal.signal(number, lambda number, _: caught.append(number))
    set_handler = signal.signal

    def keep_handler(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else set_handler(number, handler)

    with signals_deferred():
        signal.signal = keep_handler  # type: ignore[assignment]
        try:
            yield
        finally:
            signal.signal = set_handler
            for number, handler in before.items():
                signal.signal(number, handler)  # also where C++ has set its own, of which Python knows nothing
    if caught:
        signal.raise_signal(caught[0])
