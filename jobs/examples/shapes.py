"""A task of your own: which of five shapes is on an RGB picture of 32 x 32 pixels?

python jobs/examples/shapes.py shapes/ 5000    5,000 rows; new/ 1000 has others
python jobs/train.py --task jobs/examples/shapes.py:Shapes --data shapes/ --name shapes
python jobs/score.py --task jobs/examples/shapes.py:Shapes --model runs/shapes --input new/ \\
    --output out/ --shape-column shape    (without it where nobody knows the shapes)
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from mnistsum_ray import Batch, Classes, Images, RowRandom, Settings, Task

SHAPES = ("disc", "ring", "square", "diamond", "cross")


class ShapeSettings(Settings):
    dropout: float = 0.1
    """dropout rate before the last layer"""
    flip: bool = True
    """mirror half of the training pictures"""


class Pixels(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        return batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1  # of uint8[n, 32, 32, 3]


class Shapes(Task):
    name = "shapes"
    inputs = {"image": Images(32, 32, "RGB")}
    labels = {"shape": Classes(SHAPES)}
    Settings = ShapeSettings

    def network(self) -> nn.Module:
        first = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(4))
        last = (nn.Flatten(), nn.Dropout(self.settings.dropout), nn.Linear(1024, len(SHAPES)))
        return nn.Sequential(Pixels(), *first, *second, *last)

    def augment(self, batch: dict[str, np.ndarray], draws: RowRandom) -> dict[str, np.ndarray]:
        if self.settings.flip:
            is_flipped = draws.whole("flip", 2) == 1  # the same again when the run is resumed
            batch["image"][is_flipped] = batch["image"][is_flipped, :, ::-1]
        return batch


def draw(shape: int, random: np.random.Generator) -> bytes:
    size = random.uniform(6, 12)
    down, right = abs(np.mgrid[:32, :32] - random.uniform(size, 32 - size, (2, 1, 1))) / size
    away, longer = np.hypot(down, right), np.maximum(down, right)
    cross = (longer < 0.8) & (np.minimum(down, right) < 0.3)
    ink = [away < 1, abs(away - 0.8) < 0.2, longer < 0.8, down + right < 1, cross][shape]
    colours = random.permutation([random.integers(40, 110, 3), random.integers(140, 215, 3)])
    return bytes((colours[1 * ink] + random.integers(-40, 40, (32, 32, 3))).astype(np.uint8))


if __name__ == "__main__":
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    random = np.random.default_rng(rows)  # the same each time; another number gives others
    shapes = random.integers(len(SHAPES), size=rows)
    images = [draw(shape, random) for shape in shapes]
    folder.mkdir(parents=True, exist_ok=True)
    names = [SHAPES[shape] for shape in shapes]
    pq.write_table(pa.table({"image": images, "shape": names}), folder / "shapes.parquet")
