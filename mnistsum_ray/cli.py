"""What the jobs share: one line for an error or a stop, one JSON line for the result, the exit code."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TextIO

from mnistsum_ray.cluster.signals import StopOnSignals, signals_deferred
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, printable

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
INCOMPLETE: Final = 3
"""Finished, but some of the input could not be used."""

_BEGINS_AGAIN: Final = "nothing was begun, and the same command begins again"


def run(job: Callable[[list[str]], tuple[dict[str, Any], int]], argv: list[str]) -> int:
    """Run a job to its exit code: its result is the last line on standard output, an error one line on standard error.

    SIGINT, SIGTERM and SIGHUP stop it: one line says what goes on, and the exit code is 128 and the signal's number.
    """
    _open_standard_streams()
    with StopOnSignals(_say) as stop:
        try:
            code = _run(job, argv, sys.stdout, stop)
        except KeyboardInterrupt as interrupt:
            with signals_deferred():
                reason = _reason(interrupt)
                code = FAILED if isinstance(reason, RunError) else stop.exit_code
                if isinstance(reason, RunError):
                    _say(f"error: {reason}")
                else:
                    name = stop.received.name if stop.received else "SIGINT"
                    _say(f"stopped by {name}; {reason or _BEGINS_AGAIN}")
                stop.end(code)
        else:
            stop.end(code)
        if "mnistsum_ray.cluster.connection" in sys.modules:  # else there is nothing to leave
            from mnistsum_ray.cluster.connection import disconnect

            disconnect()
    return code


def _run(job: Callable[[list[str]], tuple[dict[str, Any], int]], argv: list[str], stdout: TextIO, stop: StopOnSignals) -> int:
    try:
        result, code = job(argv)
        with signals_deferred():  # a job whose result is printed is done, whatever comes
            print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
            stop.end(code)
    except RequestError as refusal:
        return _fail(refusal, REFUSED)
    except RunError as failure:
        return _fail(failure, FAILED)
    except BrokenPipeError:
        _discard(stdout.fileno())
        return _fail("standard output was closed by its reader, so the result could not be printed", FAILED)
    return code


def _reason(interrupt: BaseException) -> RunInterrupted | RunError | None:
    """What the job had come to: a further interrupt may have come while it was cleared up after that."""
    error: BaseException | None = interrupt
    while error is not None and not isinstance(error, RunInterrupted | RunError):
        error = error.__context__
    return error


def leave_stdout_to_result() -> None:
    """From here on only the job's last line goes to standard output: Ray's threads print there at any time, also after it."""
    sys.stdout = sys.stderr


def _fail(error: object, code: int) -> int:
    _say(f"error: {error}")
    return code


def _say(text: str) -> None:
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, and the exit code says it too
        _discard(2)


def _open_standard_streams() -> None:
    """Open those that are closed, on nothing: else the next file that is opened would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _discard(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _discard(number: int) -> None:
    """Have a file descriptor lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
