"""Train the two-head MNIST network; `--help` lists the flags. The same as `mnistsum train`.

python jobs/train.py --data sample
python jobs/train.py --name mine --resume
ray job submit --working-dir . -- python jobs/train.py --data sample
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
