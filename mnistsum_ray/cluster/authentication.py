"""TODO cluster.authentication"""

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def use_token_if_required(address: str) -> None:
    """Have Ray bring the token of this user to the cluster that RAY_ADDRESS names, if that asks for one.

    Ray does so by itself only where it finds the cluster by itself; and brought to a cluster that asks for none, the token keeps
    that from answering.
    """
    if "RAY_AUTH_MODE" in os.environ or not _has_token():
        return
    from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        with _without_stderr():
            GcsClient(address=address)
    except AuthenticationError:
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # it has read the variable already
    except RayError:
        return  # `ray.init` tells what it is


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep what C++ prints from standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        return (Path.home() / ".ray" / "auth_token").is_file()
    except (OSError, RuntimeError):
        return False


def ensure_token() -> None:
    """Give a cluster of our own a token in the environment, where Ray could not leave one in the home folder."""
    if _has_token() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
