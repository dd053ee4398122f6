"""Score a Delta table, or any other Dataset of Ray Data. Needs: pip install deltalake

python jobs/examples/dataset.py runs/mine /data/pairs-delta /data/scored    (or URIs)
"""

import sys

import ray

from mnistsum_ray import load_model, predict_rows

model, table, output = sys.argv[1:]
ray.init()  # the cluster of RAY_ADDRESS or of `ray start`, or one of this machine
rows = ray.data.read_delta(table)  # with the columns image and number
# `predict_rows` is a `map_batches`: the rows in their order, all columns, the predictions, and
# `reason`, null but for rows that cannot be scored. Unlike jobs/score.py nothing is counted, and a
# program that was killed begins again.
predict_rows(load_model(model), rows).write_parquet(output)
