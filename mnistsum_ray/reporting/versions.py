"""TODO reporting.versions"""

import platform
from importlib.metadata import version

from mnistsum_ray import __version__


def versions() -> dict[str, str]:
    """What a manifest says of the software that made it."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__, **packages}
