"""`python -m mnistsum_ray` is the command `mnistsum`."""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
