"""The idea of this project in one file of plain Ray, to copy for a task of your own.

python jobs/examples/own_task.py     (kill it with kill -9, and give the same command again)

Each row is trained on once an epoch, and counted, on any number of workers. A run that was killed
continues at its newest checkpoint, with as many workers as before; to train anew, delete its
folder runs/own_task. This imports nothing of the project, which handles what else can fail.
"""

import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, get_device, prepare_model


class EveryRow(ray.train.DataConfig):
    """Streams whole blocks. Ray's default would drop a row here, to make both shards equal."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        shards = datasets["train"].streaming_split(world_size, equal=False)
        return [{"train": shard} for shard in shards]


def train_loop_per_worker(config: dict[str, int]) -> list[float]:
    torch.manual_seed(0)
    model = prepare_model(torch.nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    first_epoch = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:  # another attempt has written it
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), map_location=get_device())
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epochs"]
    shard = ray.train.get_dataset_shard("train")
    shuffle: Any = {"local_shuffle_buffer_size": config["rows"]}
    for epoch in range(first_epoch, config["epochs"]):
        batches = iter(shard.iter_torch_batches(batch_size=32, local_shuffle_seed=epoch, **shuffle))
        rows_of_epoch = 0
        while True:  # until no worker has rows: one that ended sooner would let the others wait
            x = next(batches, {"x": torch.empty(0, device=get_device())})["x"][:, None]
            rows = torch.tensor(len(x), device=get_device())
            dist.all_reduce(rows)
            if rows == 0:
                break
            squares = (model(x) - (2 * x + 1)) ** 2
            loss = squares.sum() / rows  # the mean over the rows of all workers
            optimizer.zero_grad()
            (loss * dist.get_world_size()).backward()  # DDP divides by the number of workers
            optimizer.step()
            rows_of_epoch += int(rows)
        if rows_of_epoch != config["rows"]:
            raise RuntimeError(f"{rows_of_epoch} rows, and not {config['rows']}")
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"epochs": epoch + 1}, Path(folder, "state.pt"))
            is_first = ray.train.get_context().get_world_rank() == 0
            checkpoint = ray.train.Checkpoint.from_directory(folder) if is_first else None
            ray.train.report({"epochs": epoch + 1, "rows": rows_of_epoch}, checkpoint)
    return [parameter.item() for parameter in model.parameters()]


ray.init()
context = ray.data.DataContext.get_current()
context.execution_options.preserve_order = True  # each run the same
context.enable_progress_bars = context.print_on_execution_start = False  # they flood the result
rows = ray.data.range(1001).map_batches(lambda batch: {"x": (batch["id"] / 1000).astype("float32")})
rows = rows.repartition(target_num_rows_per_block=64).materialize()
gpus = int(ray.cluster_resources().get("GPU", 0))
trainer = TorchTrainer(
    train_loop_per_worker,
    train_loop_config={"rows": rows.count(), "epochs": 10},
    datasets={"train": rows},
    dataset_config=EveryRow(),
    scaling_config=ray.train.ScalingConfig(num_workers=gpus or 2, use_gpu=gpus > 0),
    run_config=ray.train.RunConfig(
        name="own_task",  # Ray Train resumes a run of this name
        storage_path=str(Path("runs").resolve()),
        failure_config=ray.train.FailureConfig(max_failures=3),
    ),
)
result = trainer.fit()
print(f"2 and 1 are learned as {result.return_value}, with all {rows.count()} rows in each epoch")
