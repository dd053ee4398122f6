"""Train the two-head MNIST network; `--help` lists the flags. The same as `mnistsum train`.

python jobs/train.py --data sample
python jobs/train.py --name mine --resume
ray job submit --working-dir . -- python jobs/train.py --data sample

What happens, and where to read it:

mnistsum_ray/training/job.py       the job, top down: read the rows, run a TorchTrainer, publish
mnistsum_ray/training/rows.py      Ray Data: read_parquet, map_batches(decode), streaming_split
mnistsum_ray/training/loop.py      what each worker does; worker.py has its steps
mnistsum_ray/cli.py                flags, signals, the JSON line, exit codes; api.py joins a cluster
"""

import sys

from mnistsum_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
