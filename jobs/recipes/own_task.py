"""Copy this for a task of your own: each row is trained on once an epoch, and all are counted.

python jobs/recipes/own_task.py     (it imports nothing of this project)
"""

from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, prepare_model


class WholeShards(ray.train.DataConfig):
    """Deals whole blocks. Ray's default would drop a row here, to make both shards equal."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        shards = datasets["train"].split(world_size)
        return [{"train": shard.iterator()} for shard in shards]


def train_loop_per_worker(config: dict[str, int]) -> int:
    model = prepare_model(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shard = ray.train.get_dataset_shard("train")
    for _ in range(3):
        batches = iter(shard.iter_torch_batches(batch_size=32, dtypes=torch.float32))
        rows, rows_of_epoch = torch.tensor(1), 0
        while rows > 0:  # all workers end in the same step: else one would wait for ever
            x = next(batches, {"x": torch.empty(0)})["x"][:, None]  # no rows, if it has no more
            rows = torch.tensor(len(x))
            dist.all_reduce(rows)
            rows_of_epoch += int(rows)
            squares = (model(x) - (2 * x + 1)) ** 2
            loss = squares.sum() / max(rows, 1)  # of all workers' rows; a mean of none is NaN
            optimizer.zero_grad()
            (loss * dist.get_world_size()).backward()  # DDP divides by the number of workers
            optimizer.step()
        if rows_of_epoch != config["rows"]:
            raise RuntimeError(f"{rows_of_epoch} rows, and not {config['rows']}")
    return rows_of_epoch


ray.init()
rows = ray.data.range(1001).map_batches(lambda batch: {"x": batch["id"] / 1000})
rows = rows.repartition(target_num_rows_per_block=64).materialize()
options = {"train_loop_config": {"rows": rows.count()}, "dataset_config": WholeShards()}
scaling = ray.train.ScalingConfig(num_workers=2)
trainer = TorchTrainer(
    train_loop_per_worker, datasets={"train": rows}, scaling_config=scaling, **options
)
print(f"each epoch had all {trainer.fit().return_value} rows")
