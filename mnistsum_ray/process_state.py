"""Changes of this process that end with a block: silent loggers, environment variables."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logger(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Hide the messages below `level` of the named loggers; their levels are restored when the block ends.

    Use it for advice of a library that the user of the app cannot follow.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, level))
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


@contextmanager
def default_environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs, for libraries without another option; variables of the user stay."""
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
