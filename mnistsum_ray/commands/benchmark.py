"""Measure the speed of training or scoring beside plain PyTorch, or of the training pipeline alone;
or the time to the original's accuracy.

    mnistsum benchmark train --data FOLDER
    mnistsum benchmark score --data FOLDER
    mnistsum benchmark feed --data FOLDER
    mnistsum benchmark accuracy --data FOLDER --repeat 5

Each way is measured in its own process, several times, in alternating order:

    loader       the original's way: torchvision's dataset row by row through a DataLoader, float32
    memory       this package's model on tensors in memory; for training with the same threads and
                 optimizer, for scoring with the fastest batch size and number of processes
    memory-int8  (score) the same with 8-bit integers
    worker       (train) the loop of memory in a Ray Train worker; the difference to ray is the
                 cost of the data pipeline
    ray          mnistsum train or mnistsum score
    ray-int8     (score) mnistsum score --precision int8

`feed` hands rows to workers that do not train: from memory, or streamed from Parquet of raw bytes
(stream) or PNG (stream-png), to one worker or to two (-2). `accuracy` measures the time from the
command to a model that is as accurate as the original after its five epochs, with the recipe
`quick` and `--repeat` seeds, beside the original's way.

The table on standard error holds medians, with minimum and maximum in parentheses;
mnistsum_ray/benchmark/README.md explains the figures. The last line on standard output is one JSON
object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

from typing import Any


def run(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the benchmark; return its result and its exit code."""
    from mnistsum_ray.benchmark import suite  # imported here, after cli.run has begun to catch signals

    return suite.benchmark(__doc__ or "", argv)
