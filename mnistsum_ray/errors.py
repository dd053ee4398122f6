"""Errors that end a job, whose one-line message says why and what to do; helpers to write it."""

import json
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class RequestError(ValueError):
    """The request is invalid; the message says why and what to do."""


class RunError(RuntimeError):
    """A valid request failed; the message says why and what to do."""


class TryAgainError(RunError):
    """The same command may work later: no resources in time, no answer, or another run is there."""


class RepeatingError(RunError):
    """All workers have failed at the same step, and another attempt would fail there again."""


class CheckpointError(RunError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


class TaskError(RunError):
    """A task breaks its promises; the message names the task, the method and what was expected."""


class RowCountError(RunError):
    """Rows were lost or repeated, so results computed from them are wrong."""


class StorageError(OSError):
    """The storage refuses, and would give the same answer again."""


class TransientStorageError(StorageError):
    """Another attempt may succeed."""


class NoAnswerError(TransientStorageError):
    """The storage does not answer, is not able to now, or the keys may have expired."""


class MissingFileError(TransientStorageError):
    """There is no such file; one that was listed has been deleted since."""


class ConflictError(TransientStorageError):
    """There is a file already where none should be, or another version than the one expected."""


class UnusableFileError(ValueError):
    """A file cannot be used; the message says why and what to do."""


class RunInterrupted(KeyboardInterrupt):
    """The run was interrupted; the message says what is kept and how to continue."""


def ended_by_storage(error: StorageError, how_to_resume: str) -> RunError:
    """Return the error of a job that its storage ends: it may work later, or never."""
    kind = TryAgainError if isinstance(error, TransientStorageError) else RunError
    first_line = str(error).partition("\n")[0]  # an actor's error continues with Ray's advice
    return kind(f"{first_line}; {how_to_resume}")


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; its class name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def root_cause(error: BaseException) -> str:
    """Return the line of an error's message that names the cause.

    Ray keeps the exception of a task as `cause`, and Ray Train that of a lost worker as
    `health_check_failure`. Other messages may hold the traceback of another process, which ends
    with the cause; Ray's OutOfMemoryError begins with it, and ends with advice.
    """
    error = getattr(error, "health_check_failure", error)
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        first, *_ = str(cause).strip().splitlines() or [""]
        return f"{type(cause).__name__}: {first}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if type(error).__name__ == "OutOfMemoryError" else -1].strip()


def shortened(text: str) -> str:
    """Return text cut to a length that fits in a message; a user's input may have any length."""
    return text if len(text) <= 300 else f"{text[:300]}…"


def spelled(value: Any) -> str:
    """Return a setting's value as a user writes it: `true` and `null`, not `True` and `None`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def counted(count: int, noun: str) -> str:
    """Return a number of things: `1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """Return a share of 0..1: `99.46 %`."""
    return f"{share:.2%}".replace("%", " %")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown word: `; did you mean train?`, or nothing."""
    like = get_close_matches(word, known, n=1)
    return f"; did you mean {like[0]}?" if like else ""


def printable(text: str) -> str:
    """Return text with control characters escaped, so that no file name controls the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shell_command(command: str) -> str:
    """Return how this process was started: `python jobs/train.py`, or `mnistsum train`."""
    if Path(sys.argv[0]).parent.name == "jobs":
        return f"python jobs/{command.replace('-', '_')}.py"
    return f"mnistsum {command}"
