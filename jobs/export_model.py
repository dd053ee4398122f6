"""Export a model for programs without this package. The same as `mnistsum export-model`.

python jobs/export_model.py --model runs/mine --output exported/
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export-model", *sys.argv[1:]]))
