"""Errors that end a job, each with a one-line message that says why and what to do; and helpers to write such lines."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

_MAX_QUOTED_CHARACTERS: Final = 300


class RequestError(ValueError):
    """The request is invalid; the message says why and what to do."""


class RunError(RuntimeError):
    """A valid request failed; the message says why and what to do."""


class TryAgainError(RunError):
    """The same command may work later: no resources in time, no cluster, a folder that another run holds."""


class RowCountError(RunError):
    """Rows were lost or repeated, so results computed from them are wrong."""


class StorageError(OSError):
    """The storage does not answer, refuses, or a file is gone: another attempt may succeed. The message names the file."""


class MissingFileError(StorageError):
    """There is no such file."""


class ExistingFileError(StorageError):
    """There is such a file already, or another version of it, so nothing was written."""


class UnusableFileError(ValueError):
    """A file cannot be used; the message says why and what to do."""


class RunInterrupted(KeyboardInterrupt):
    """The run was interrupted; the message says what is kept and how to continue."""


class TextAsked(SystemExit):
    """The command line asks for a text, such as that of `--help`, in place of a job."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its class name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def lines_of(error: BaseException) -> list[str]:
    """The lines of the message of an error; its class name if it has no message."""
    return str(error).strip().splitlines() or [type(error).__name__]


def root_cause(error: BaseException) -> str:
    """The line of an error's message that names the cause.

    Ray keeps the exception of a task as `cause`, to whose message Ray Data adds lines of advice. Otherwise this is the last line,
    since a message may hold the traceback of another process; of Ray's OutOfMemoryError, which ends with advice, the first.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return explained(f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}")
    lines = lines_of(error)
    return lines[0 if type(error).__name__ == "OutOfMemoryError" else -1].strip()


def explained(text: str) -> str:
    """An error of CUDA, with what to do where it does not say so."""
    exclusive = "; does the card admit one process alone? Then give --num-workers 1"
    return text + exclusive if "busy or unavailable" in text else text


def shortened(text: str) -> str:
    """Text cut to a length that fits in a message; a user's input may have any length."""
    return text if len(text) <= _MAX_QUOTED_CHARACTERS else f"{text[:_MAX_QUOTED_CHARACTERS]}…"


def counted(count: int, noun: str) -> str:
    """A number of things: `1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share of 0..1: `99.46 %`."""
    return f"{share:.2%}".replace("%", " %")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a message on an unknown word: `; did you mean train?`, or nothing where no known word is like it."""
    like = get_close_matches(word, known, n=1)
    return f"; did you mean {like[0]}?" if like else ""


def printable(text: str) -> str:
    """Text with control characters and line breaks escaped: a file name could otherwise steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shell_command(command: str) -> str:
    """Beginning of the command line that this process was started with: `python jobs/train.py`, or `mnistsum train`."""
    script = Path(sys.argv[0])
    return f"python jobs/{command.replace('-', '_')}.py" if script.parent.name == "jobs" else f"mnistsum {command}"
