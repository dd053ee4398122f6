"""One run at a time in an output folder.

The driver holds the folder with `output_lock`: on a disk by a lock of the kernel (lock_file.py), which ends with the process; in
an object store by a lease (lease.py), a small object that it renews. The lock file, or the lease, names the holder. Workers get a
`Fence`, which compares that name before they write.
"""

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from mnistsum_ray.storage.lease import Lease
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_file import LOCK_NAME, kernel_lock, read_lock, taken_over_message

_CHECK_SECONDS: Final = 1.0
"""Seconds between two looks at the lock."""


@dataclass
class Fence:
    """Check for the workers of a run, before each write, that the run still holds its folder. Pickled to the workers."""

    place: Location
    holder: str

    def check(self) -> None:
        """Read the lock, at most once a second.

        Raises:
            OSError: another run has taken the folder, or the storage does not answer.
        """
        # A suspended process reads the lock again when it goes on: the clock has advanced meanwhile.
        now = time.monotonic()
        if now - getattr(self, "_checked", -_CHECK_SECONDS) < _CHECK_SECONDS:
            return
        record = read_lock(self.place)
        if record is None or record["id"] != self.holder:
            raise OSError(f"{taken_over_message(record)}; this run writes nothing more")
        self._checked = now

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "holder": self.holder}


@dataclass
class OutputLock:
    """A folder that this run holds."""

    fence: Fence
    check: Callable[[], None]
    """Raises RunError once the folder is lost."""
    conditional_writes: bool
    """Whether the storage has conditional writes, so that a lost lease is noticed with certainty."""
    lost: threading.Event = field(default_factory=threading.Event)
    """Set once the folder is lost."""

    @contextmanager
    def interrupting(self, also: threading.Event) -> Iterator[None]:
        """Raise KeyboardInterrupt in the main thread if the folder is lost, or `also` is set, inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_CHECK_SECONDS):
                if self.lost.is_set() or also.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@contextmanager
def output_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[OutputLock]:
    """Hold a folder, which is created where it is missing.

    Args:
        flag: names the folder in messages.

    Raises:
        RequestError: another run holds it, or it cannot be written.
    """
    holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    fence = Fence((folder / LOCK_NAME).with_retries(), holder)
    if folder.is_local:
        with kernel_lock(folder, flag, holder):
            yield OutputLock(fence, lambda: None, conditional_writes=False)
    else:
        with Lease(folder, flag, holder, say) as lease:
            yield OutputLock(fence, lease.check, lease.conditional, lease.lost)
