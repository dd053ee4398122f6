"""A task of your own: the price of a house, in 100,000 euros, from eight numbers.

python jobs/examples/houses.py houses/ 5000    5,000 rows; new/ 1000 has others
python jobs/train.py --task jobs/examples/houses.py:Houses --data houses/ --name houses
python jobs/score.py --task jobs/examples/houses.py:Houses --model runs/houses --input new/ \\
    --output out/ --price-column price    (without it where nobody knows the prices)
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mnistsum_ray import Batch, Numbers, Settings, Task

FEATURES = {"area": (120, 40), "rooms": (4.5, 1.2), "age": (40, 20), "floor": (2, 1.5)}
FEATURES |= {"garden": (300, 150), "distance": (10, 4), "noise": (55, 8), "income": (40, 12)}


class HouseSettings(Settings):
    width: int = 64
    """values of each hidden layer"""


class Scaled(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        scaled = [(batch[name] - mean) / spread for name, (mean, spread) in FEATURES.items()]
        return torch.stack(scaled, dim=1)


class Houses(Task):
    name = "houses"
    inputs = {name: Numbers() for name in FEATURES}
    labels = {"price": Numbers()}
    outputs = pa.schema({"pred_price": pa.float32()})
    Settings = HouseSettings
    bf16 = False  # a price has more than three digits

    def network(self) -> nn.Module:
        width = self.settings.width
        hidden = (nn.Linear(len(FEATURES), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        return nn.Sequential(Scaled(), *hidden, nn.Linear(width, 1), nn.Flatten(0))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["price"]) ** 2  # of each row

    def predict(self, outputs: Tensor, batch: Batch) -> Batch:
        return {"pred_price": outputs}

    def row_metrics(self, predicted: Batch, batch: Batch) -> Batch:
        error = predicted["pred_price"] - batch["price"]
        return {"absolute_error": error.abs(), "squared_error": error**2}

    def reduce_metrics(self, rows: int, sums: Mapping[str, float]) -> dict[str, float]:
        means = super().reduce_metrics(rows, sums)
        return means | {"root_mean_square_error": means.pop("squared_error") ** 0.5}


if __name__ == "__main__":
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    random = np.random.default_rng(rows)  # the same each time; another number gives others
    houses = {name: random.normal(*FEATURES[name], rows) for name in FEATURES}
    price = houses["area"] * houses["income"] / 2000 * np.exp(-houses["distance"] / 20)
    price += houses["garden"] / 400 - abs(houses["age"] - 40) / 50 + random.normal(0, 0.1, rows)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(houses | {"price": price}), folder / "houses.parquet")
