"""Override log levels, environment variables and functions of other packages while a block runs."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def quiet_logger(*names: str) -> Iterator[None]:
    """Hide the messages below ERROR of the named loggers: advice of a library that the user of the app cannot follow."""
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
    """Set environment variables, for libraries without another option; variables of the user stay."""
    missing = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def replaced(find_owner: Callable[[], Any], name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function by what `make` makes of it; do nothing where there is none of this name."""
    owner = original = None
    with suppress(AttributeError):
        owner = find_owner()
        original = getattr(owner, name)
        setattr(owner, name, make(original))
    try:
        yield
    finally:
        if original is not None:
            setattr(owner, name, original)
