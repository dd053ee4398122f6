"""Train the two-head MNIST network: which digit is it, and what is digit + number.

    python jobs/train.py                                   full MNIST where it is, else the bundled sample
    python jobs/train.py --data sample                     about a minute on a laptop
    python jobs/train.py --data s3://bucket/mnist --num-workers 4 --storage-path s3://bucket/runs --name mine
    python jobs/train.py --name mine --resume              go on after a kill
    ray job submit --working-dir . -- python jobs/train.py --data sample

Brackets hold what an unset flag becomes. Exit codes: 0 done, 2 the request is wrong, 1 anything else.
The last line on standard output is one JSON object; everything else goes to standard error.
"""

import sys
from typing import Any

from mnistsum_ray import cli


def train(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.arguments import parse  # not sooner: first of all a signal has to be caught
    from mnistsum_ray.config import TrainConfig

    config = parse(TrainConfig, argv, __doc__)

    cli.leave_stdout_to_result()

    from mnistsum_ray import fit  # numpy and more, which `--help` should not wait for

    return fit(config), cli.DONE


def main(argv: list[str]) -> int:
    return cli.run(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
