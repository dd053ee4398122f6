"""Run a job: one JSON line for its result, one line for an error or a stop, and the exit code."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TextIO

from mnistsum_ray.cluster.graceful_stop import StopOnSignals
from mnistsum_ray.cluster.signals import defer_signals
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, printable

DONE: Final = 0
FAILED: Final = 1
BAD_REQUEST: Final = 2
INCOMPLETE: Final = 3
"""The job finished, but some of its input could not be used."""

_NOTHING_BEGUN: Final = "nothing was begun, and the same command begins again"

Job = Callable[[list[str]], tuple[dict[str, Any], int]]
"""Takes the command line's arguments; returns the result and the exit code."""


def run(job: Job, argv: list[str]) -> int:
    """Run a job and return its exit code. Its result is the last line on standard output, an error one line on standard error.

    SIGINT, SIGTERM and SIGHUP stop the job: one line says how to go on, and the exit code is 128 plus the number of the signal.
    Afterwards the process should exit: a later signal ends it at once, and 20 s later it ends by itself.
    """
    _open_standard_streams()
    stdout = sys.stdout
    try:
        with StopOnSignals(_say) as stop:
            code = _run_or_stop(job, argv, stdout, stop)
            if "mnistsum_ray.cluster.connection" in sys.modules:  # without that module there is no connection
                from mnistsum_ray.cluster.connection import disconnect

                disconnect(keep_logs=code not in (DONE, INCOMPLETE))
    finally:
        sys.stdout = stdout  # only now: until they are disconnected, Ray's threads may print after the result
    return code


def reserve_stdout_for_result() -> None:
    """Send to standard error what is printed from here to the end of `run`, since Ray's threads print at any time."""
    sys.stdout = sys.stderr


def _run_or_stop(job: Job, argv: list[str], stdout: TextIO, stop: StopOnSignals) -> int:
    try:
        code = _run(job, argv, stdout, stop)
    except KeyboardInterrupt as interrupt:
        with defer_signals():
            reason = _find_reason(interrupt)
            code = FAILED if isinstance(reason, RunError) else stop.exit_code
            if isinstance(reason, RunError):
                _say(f"error: {reason}")
            else:
                name = stop.received.name if stop.received else "SIGINT"
                _say(f"stopped by {name}; {reason or _NOTHING_BEGUN}")
            stop.end(code)
    else:
        stop.end(code)
    return code


def _run(job: Job, argv: list[str], stdout: TextIO, stop: StopOnSignals) -> int:
    try:
        result, code = job(argv)
        with defer_signals():  # once the result is printed, a signal no longer changes the exit code
            print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
            stop.end(code)
    except RequestError as error:
        return _fail(error, BAD_REQUEST)
    except RunError as error:
        return _fail(error, FAILED)
    except BrokenPipeError:
        _redirect_to_devnull(stdout.fileno())
        return _fail("standard output was closed by its reader, so the result could not be printed", FAILED)
    return code


def _find_reason(interrupt: BaseException) -> RunInterrupted | RunError | None:
    """Return the job's own error, if a further interrupt came during its cleanup and replaced it."""
    error: BaseException | None = interrupt
    while error is not None and not isinstance(error, RunInterrupted | RunError):
        error = error.__context__
    return error


def _fail(error: object, code: int) -> int:
    _say(f"error: {error}")
    return code


def _say(text: str) -> None:
    """Write a line to standard error. If its reader has closed it, only the exit code tells of the error."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _redirect_to_devnull(2)


def _open_standard_streams() -> None:
    """Open closed standard streams on /dev/null: else the next file that is opened would receive what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _redirect_to_devnull(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _redirect_to_devnull(descriptor: int) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    if devnull != descriptor:
        os.dup2(devnull, descriptor)
        os.close(devnull)
