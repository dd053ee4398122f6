"""Signals are deferred, whichever thread takes them, and their handlers are back afterwards."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mnistsum_ray.cluster.stop import STOP_SIGNALS, defer_signals

_arrived: list[int] = []


def _interrupt(number: int, _: object) -> None:
    _arrived.append(number)
    raise KeyboardInterrupt


@pytest.fixture
def other_thread() -> Iterator[int]:
    """The id of a thread that takes signals; each raises KeyboardInterrupt in the main thread."""
    _arrived.clear()
    before = {number: signal.signal(number, _interrupt) for number in STOP_SIGNALS}
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield thread.ident or 0
    assert {signal.getsignal(number) for number in STOP_SIGNALS} == {_interrupt}
    end.set()
    thread.join()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_delivered_after_the_block(other_thread: int) -> None:
    finished = []
    with suppress(KeyboardInterrupt), defer_signals():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.pthread_kill(other_thread, number)
            time.sleep(0.05)
        finished.append(_arrived.copy())
    assert (finished, _arrived) == ([[]], [signal.SIGTERM])


def start_ray(thread: int) -> None:
    with defer_signals():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as `ray.init` does
        signal.pthread_kill(thread, signal.SIGTERM)
        time.sleep(1)


def test_a_signal_that_ray_answers_in_its_start_is_delivered_after_it(other_thread: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        start_ray(other_thread)
    assert _arrived == [signal.SIGTERM]


@pytest.mark.usefixtures("other_thread")
def test_in_another_thread_nothing_is_deferred() -> None:
    found: list[object] = []

    def work() -> None:
        with defer_signals():
            found.extend(signal.getsignal(number) for number in STOP_SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert set(found) == {_interrupt}
