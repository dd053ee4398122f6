"""Versions of the software that a manifest records."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from mnistsum_ray import __version__


def versions() -> dict[str, str]:
    """Versions of Python, of this package (with its commit, in a checkout) and of the packages that its results depend on."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    commit = _commit()
    ours = {"mnistsum_ray": __version__} | ({"commit": commit} if commit else {})
    return {"python": platform.python_version(), **ours, **packages}


def _commit() -> str | None:
    """Commit of the source that this process runs, with `+` if files of the package have changed; None outside of a checkout."""
    package = Path(__file__).parents[1]
    if shutil.which("git") is None or not (package.parent / ".git").exists():
        return None

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=False, timeout=10)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--", str(package)) else commit or None
    except (OSError, subprocess.TimeoutExpired):  # as on a network file system that does not answer
        return None
