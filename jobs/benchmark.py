"""Measure speed beside plain PyTorch and Ray's guides: mnistsum_ray/benchmark/README.md says how.

python jobs/benchmark.py train --data FOLDER
"""

import sys

from mnistsum_ray import cli
from mnistsum_ray.benchmark.suite import benchmark

if __name__ == "__main__":
    sys.exit(cli.run(benchmark, sys.argv[1:]))
