"""Write example input for jobs/score.py. The same as `mnistsum export-pairs`.

python jobs/export_pairs.py --output pairs/
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export-pairs", *sys.argv[1:]]))
