"""Score Parquet files of image/number pairs with a trained model. The same as `mnistsum score`.

python jobs/score.py --model runs/mine --input pairs/ --output scored/
ray job submit --working-dir . -- python jobs/score.py --model M --input I --output scored/
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
