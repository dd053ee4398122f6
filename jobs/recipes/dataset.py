"""Score a Delta table, or any other Dataset of Ray Data. Needs: pip install deltalake

python jobs/recipes/dataset.py runs/mine /data/pairs-delta /data/scored    (or URIs)
"""

import sys

import ray

from mnistsum_ray import load_model, predict_rows

model, table, output = sys.argv[1:]
ray.init()  # the cluster of RAY_ADDRESS or of `ray start`, or one of this machine
rows = ray.data.read_delta(table)  # with the columns image and number
# `predict_rows` is a `map_batches`: all columns, the predictions, and `reason`, which is given to
# rows that cannot be scored, in the order of the rows. Unlike jobs/score.py nothing is counted, and
# a program that was killed begins again.
predict_rows(load_model(model), rows).write_parquet(output)
