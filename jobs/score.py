"""Score Parquet files of image/number pairs with a trained model. The same as `mnistsum score`.

python jobs/score.py --model runs/mine --input pairs/ --output scored/
ray job submit --working-dir . -- python jobs/score.py --model M --input I --output scored/

What happens, and where to read it:

mnistsum_ray/cli.py               flags, signals, the JSON line, exit codes
mnistsum_ray/api.py               `score`: join a Ray cluster, or start one
mnistsum_ray/scoring/job.py       the job: plan the parts, score those that are not there, count all
mnistsum_ray/scoring/actor.py     what an actor of Ray Data does with its parts
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
