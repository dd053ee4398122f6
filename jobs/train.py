"""Train the two-head MNIST network; `--help` lists the flags. The same as `mnistsum train`.

python jobs/train.py --data sample
python jobs/train.py --name mine --resume
ray job submit --working-dir . -- python jobs/train.py --data sample

What happens, and where to read it:

mnistsum_ray/cli.py                 flags, signals, the JSON line, exit codes
mnistsum_ray/api.py                 `fit`: join a Ray cluster, or start one
mnistsum_ray/training/driver.py     wait for workers, read the rows, run a TorchTrainer, publish
mnistsum_ray/training/pipeline.py   a Ray Dataset for each worker: its rows of every step, in order
mnistsum_ray/training/loop.py       what each worker does
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
