"""Train the two-head MNIST network, which predicts the digit of an image and the sum digit + number.

    mnistsum train                           full MNIST if it can be found, else the bundled sample
    mnistsum train --data sample             takes a minute or two on a laptop
    mnistsum train --data s3://bucket/mnist --num-workers 4 --storage-path s3://bucket/runs
    mnistsum train --name mine --resume      continues after a kill
    mnistsum train --from-run runs/mine      trains the same model again
    ray job submit --working-dir . -- python jobs/train.py --data sample

The value of an unset flag is in brackets below. Exit codes: 0 done, 2 the request is invalid,
128 + N stopped by signal N, 1 anything else. The last line on standard output is one JSON object;
everything else goes to standard error.
"""

from typing import Any

from mnistsum_ray import cli


def run(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the job; return its result and its exit code."""
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import TrainConfig

    config = parse(TrainConfig, argv, __doc__)

    cli.reserve_stdout_for_result()

    from mnistsum_ray.api import run_training  # imports NumPy and more, which would delay --help

    return run_training(config), cli.DONE
