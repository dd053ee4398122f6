"""Override environment variables of other packages while a block runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


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
