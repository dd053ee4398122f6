"""`python -m mnistsum_ray.benchmark` measures speed, as `jobs/benchmark.py` does."""

import sys

from mnistsum_ray.benchmark.suite import main

if __name__ == "__main__":
    sys.exit(main())
