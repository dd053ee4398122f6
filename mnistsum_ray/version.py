"""Version of this package.

It is not read from the installed package, because a submitted job runs in a copy of the source, and its manifest must name the
version of that copy.
"""

from typing import Final

__version__: Final = "0.1.0"
