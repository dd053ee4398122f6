"""Keep `ray.init` from changing this process and from writing to its standard error, and its workers from the working folder."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_RAY_OPT_OUT: Final = "RAY_USAGE_STATS_ENABLED"
"""`ray.init` sets it to 0 for a cluster that it starts. It stays: without it Ray Data, in this process, would collect usage
statistics of every pipeline and look for a Prometheus server."""


@contextmanager
def preserve_environment() -> Iterator[None]:
    """Restore `os.environ` after the block, except RAY_USAGE_STATS_ENABLED.

    `ray.init` overwrites PYTHONBREAKPOINT, and sets RAY_AUTH_MODE if it is not set.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys() - {_RAY_OPT_OUT}:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name != _RAY_OPT_OUT})


@contextmanager
def preserve_ray_log_level() -> Iterator[None]:
    """Restore the level of the logger `ray` after the block; `ray.init` sets it for the whole process."""
    logger = logging.getLogger("ray")
    before = logger.level
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def hide_working_folder() -> Iterator[None]:
    """Leave the working folder while the block runs, so that Ray's workers do not import from it.

    Ray puts the driver's working folder first in the workers' import path: a `pandas.py` that lies beside the user's data would
    be executed in each worker. If the folder is in the import path of this process, it stays in that of the workers too.
    """
    working_folder = Path.cwd()
    if {"", str(working_folder)} & set(sys.path):
        yield
        return
    os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(working_folder)


@contextmanager
def discard_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2 while the block runs, as C++ code does."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
