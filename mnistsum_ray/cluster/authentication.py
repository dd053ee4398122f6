"""Ray's token authentication: send the user's token where the cluster asks for it, and make one where none can be stored.

Both functions set variables in `os.environ`. Ray reads them during `ray.init`: its C++ code caches them for this process, and the
processes that it starts inherit them. The caller restores the environment after that.
"""

import os
import secrets
import tempfile
from pathlib import Path

from mnistsum_ray.cluster import ray_internals
from mnistsum_ray.cluster.process_state import discard_stderr


def use_token_if_required(address: str) -> None:
    """Set RAY_AUTH_MODE=token if the user has a token and the cluster at this address asks for one.

    Ray sends a token by itself only to a cluster that it finds without an address. A token cannot be sent in every case: a
    cluster that asks for none does not answer a client that sends one.
    """
    if "RAY_AUTH_MODE" in os.environ or not _has_token():
        return
    from ray.exceptions import RayError

    ray_internals.reload_authentication()  # an earlier connection of this process may have left the token mode in the cache
    try:
        with discard_stderr():  # Ray's C++ code logs a rejected token there
            rejected = ray_internals.rejects_this_client(address)
    except RayError:
        return  # `ray.init` fails for the same reason, and reports it
    if rejected:
        os.environ["RAY_AUTH_MODE"] = "token"
        ray_internals.reload_authentication()


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        return (Path.home() / ".ray" / "auth_token").is_file()
    except (OSError, RuntimeError):
        return False


def ensure_token() -> None:
    """Set RAY_AUTH_TOKEN for a new cluster if Ray cannot write a token file to the home folder."""
    if _has_token() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray_internals.reload_authentication()  # an earlier cluster of this process may have left its token in the cache
