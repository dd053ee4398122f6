"""One run at a time on one folder: a kernel's lock on a disk, a lease in an object store."""

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

from mnistsum_ray.storage.file_lock import file_lock
from mnistsum_ray.storage.lease import Lease
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME, read_lock, taken_over_by

_LOOK_SECONDS: Final = 1.0
"""A worker looks so often whether the folder is still its run's."""


@dataclass
class Fence:
    """Goes to the workers of a run: none writes any more when another run has taken the folder."""

    place: Location
    holder: str

    def check(self) -> None:
        """Look, now and then, whether the folder is still held.

        Raises:
            OSError: it is not, or the storage does not answer.
        """
        # The clock goes on while a process is stopped, so the first thing that it does after that is to look.
        now = time.monotonic()
        if now - getattr(self, "_looked", -_LOOK_SECONDS) < _LOOK_SECONDS:
            return
        found = read_lock(self.place)
        if found is None or found["id"] != self.holder:
            raise OSError(f"{taken_over_by(found)}; this run writes nothing more")
        self._looked = now

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "holder": self.holder}


@dataclass
class OutputLock:
    """A folder that is held."""

    fence: Fence
    check: Callable[[], None]
    """Raises RunError once the folder is no longer held."""
    conditional: bool
    """Whether the storage knows conditional writes."""
    lost: threading.Event = field(default_factory=threading.Event)
    """Set once the folder is no longer held."""

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the block runs, KeyboardInterrupt is raised in the main thread if the folder is lost: it may wait for long."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_LOOK_SECONDS):
                if self.lost.is_set():
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
    """Hold a folder, which is made where it is not there.

    On a file system a lock of the kernel, which ends with the process however that ends. An object store has none: there a
    small object is renewed every two seconds, by conditional writes, so that of two runs one knows that it has lost.

    Args:
        folder: to be held.
        flag: that names it, for messages.
        say: takes a line for the console.

    Raises:
        RequestError: another run holds it, or nothing can be written there.
    """
    holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    fence = Fence((folder / LOCK_NAME).with_retries(), holder)
    if folder.is_local:
        with file_lock(folder, flag, holder):
            yield OutputLock(fence, lambda: None, conditional=False)
    else:
        with Lease(folder, flag, holder, say) as lease:
            yield OutputLock(fence, lease.check, lease.conditional, lease.lost)
