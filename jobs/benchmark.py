"""Measure speed beside plain PyTorch; `--help` lists what and how.

python jobs/benchmark.py train --data FOLDER
"""

import sys

from mnistsum_ray.benchmark.suite import main

if __name__ == "__main__":
    sys.exit(main())
