"""Train the two-head MNIST network, which predicts the digit of an image and the sum digit + number.

    python jobs/train.py                                   on full MNIST if it can be found, else on the bundled sample
    python jobs/train.py --data sample                     takes a minute or two on a laptop
    python jobs/train.py --data s3://bucket/mnist --num-workers 4 --storage-path s3://bucket/runs --name mine
    python jobs/train.py --name mine --resume              continues after a kill
    ray job submit --working-dir . -- python jobs/train.py --data sample

The value of an unset flag is in brackets below. Exit codes: 0 done, 2 the request is invalid, 128 + N stopped
by signal N, 1 anything else. The last line on standard output is one JSON object; everything else goes to standard error.
"""

import sys
from typing import Any

from mnistsum_ray import cli


def train(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import TrainConfig

    config = parse(TrainConfig, argv, __doc__)

    cli.reserve_stdout_for_result()

    from mnistsum_ray import fit  # imports NumPy and more, which would delay --help

    return fit(config), cli.DONE


def main(argv: list[str]) -> int:
    return cli.run(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
