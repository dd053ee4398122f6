"""Versions of the software that a manifest records."""

import platform
from importlib.metadata import version

from mnistsum_ray.version import __version__


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that its results depend on."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__, **packages}
