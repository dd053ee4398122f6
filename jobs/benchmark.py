"""Measure speed beside plain PyTorch; `--help` lists what and how. The same as `mnistsum benchmark`.

python jobs/benchmark.py train --data FOLDER
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
