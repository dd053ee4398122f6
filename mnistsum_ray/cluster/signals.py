"""Stop a job in order: the first SIGINT, SIGTERM or SIGHUP is a KeyboardInterrupt."""

import os
import signal
import time
from types import FrameType
from typing import Final

_REPEAT_SECONDS: Final = 2.0
"""A signal so soon after another is the same one: `timeout` and terminals send it twice."""


class StopOnSignals:
    """From here on a stop signal raises KeyboardInterrupt, and a second one ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.exit_code: int | None = None
        """Of a job that is over: no signal changes it any more."""
        self._received_at = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` ignores SIGHUP, and a script's `&` SIGINT.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if self.exit_code is None:
                raise KeyboardInterrupt
        elif now - self._received_at > _REPEAT_SECONDS:
            os._exit(128 + self.received if self.exit_code is None else self.exit_code)
