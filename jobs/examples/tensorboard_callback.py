"""Train, and show each epoch in TensorBoard. Needs: pip install tensorboard

python jobs/examples/tensorboard_callback.py --data sample    (any flags of jobs/train.py)
tensorboard --logdir tensorboard
"""

import sys
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from torch.utils.tensorboard import SummaryWriter

from mnistsum_ray import TrainConfig, config_from_args, fit


class TensorBoard(UserCallback):
    """Ray Train calls it in another process on this machine, with another working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        line = metrics[0]  # of rank 0; all ranks report the same
        with SummaryWriter(self.folder) as writer:
            writer.add_scalar("train/loss", line["train_loss"], line["epoch"])
            for split in ("validation", "test"):
                for name, value in line[split].items():
                    writer.add_scalar(f"{split}/{name}", value, line["epoch"])


config = config_from_args(TrainConfig, sys.argv[1:])
name = config.name or time.strftime("%Y%m%d-%H%M%S")
fit(config, callbacks=[TensorBoard(Path("tensorboard") / name)])
