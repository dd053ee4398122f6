"""Make scoring input of your own photos of digits. Needs nothing more.

python jobs/examples/photos.py photos.csv photos.parquet    (columns of the CSV: file, number)
python jobs/score.py --model runs/mine --input photos.parquet --output scored/
"""

import csv
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray import RequestError
from mnistsum_ray.mnist import prepare_picture

source, output = map(Path, sys.argv[1:])
columns = {"file": pa.string(), "number": pa.int64(), "image": pa.binary(), "problem": pa.string()}
with source.open(newline="") as lines:
    rows = list(csv.DictReader(lines))
for row in rows:
    row["number"] = int(row["number"])
    try:
        # Grey, cropped to the ink, scaled and centred, as MNIST's images were.
        row["image"] = prepare_picture(source.parent / row["file"]).tobytes()
    except RequestError as error:
        print(error, file=sys.stderr)
        row["problem"] = str(error)  # scoring rejects the row, since its image is null
pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), output)
