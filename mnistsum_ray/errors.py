"""How a job ends other than well: each error carries one line that says why and what to do."""

from typing import Final

_MOST_LETTERS: Final = 300


class RequestError(ValueError):
    """The request cannot be carried out as it stands; the message is one line that says why and what to do."""


class RunError(RuntimeError):
    """What was asked for was sound and did not come about; the message is one line that says why and what to do."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of what an error says: where it carries a traceback of another process, what that came to.

    Where Ray has ended a process for want of memory it is the first, which says so; the last is advice.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if type(error).__name__ == "OutOfMemoryError" else -1].strip()


class RunInterrupted(KeyboardInterrupt):
    """The run was interrupted; the message says what is kept, and what goes on."""


def shortened(text: str) -> str:
    """Text that fits in a message: what somebody gave may be of any length."""
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"


def printable(text: str) -> str:
    """Text of which nothing steers a terminal or begins a new line: files of others may have any name."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class RowCountError(RunError):
    """Rows were lost or seen twice, so what was computed from them cannot be trusted."""
