"""Versions of the software that a manifest records."""

import platform
from importlib.metadata import version
from typing import Final

__version__: Final = "0.1.0"
"""Version of this package. It is not read from the installed package, because a submitted job runs in a copy of the source, and
its manifest must name the version of that copy."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that its results depend on."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__, **packages}
