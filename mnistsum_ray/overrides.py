"""Override log levels and environment variables of other packages while a block runs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logger(*names: str) -> Iterator[None]:
    """Hide the messages below ERROR of loggers: advice of a library that a user cannot follow."""
    before = {name: logging.getLogger(name).level for name in names}
    for name, level in before.items():
        logging.getLogger(name).setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def default_environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for libraries without another option; those of the user stay."""
    missing = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
