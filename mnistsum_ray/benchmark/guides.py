"""Ray's guides as they stand, with our network: what a user would write instead of this project.

    python -m mnistsum_ray.benchmark.guides train ROWS RUNS EPOCHS
    python -m mnistsum_ray.benchmark.guides score PAIRS OUTPUT MODEL

Training: https://docs.ray.io/en/latest/train/user-guides/data-loading-preprocessing.html. Scoring, with job-level
checkpoints: https://docs.ray.io/en/latest/data/batch_inference.html. The rows are those of `suite.write_rows`.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any, Final

import numpy as np
import ray
import ray.train.torch
import torch
from ray.data.checkpoint import CheckpointConfig

from mnistsum_ray.benchmark.plain import BATCH, TrainingStep, load_predictor
from mnistsum_ray.data.images import SIDE, Pixels

_CORES: Final = os.cpu_count() or 1
_GPUS: Final = int(torch.cuda.is_available())


def read(folder: str) -> ray.data.Dataset:
    return ray.data.read_parquet(folder)  # noqa: TID251 - it is what is measured, on files that the benchmark has written


def decode(batch: dict[str, Any]) -> Pixels:
    return np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, SIDE, SIDE)


class Score:
    """The actor that predicts."""

    def __init__(self, model: str) -> None:
        self.predictor = load_predictor(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        predictions = self.predictor.predict(decode(batch), batch["number"].astype(np.int64))
        return {"id": batch["id"], "digit": batch["digit"], **predictions.values}


def score(pairs: str, output: str, model: str) -> dict[str, float]:
    """Score files. After a kill, the same command leaves out the rows that Ray Data has noted as written."""
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig("id", f"{output}/checkpoint")
    pool, started = ray.data.ActorPoolStrategy(size=1 if _GPUS else _CORES), time.perf_counter()
    scored = read(pairs).map_batches(Score, fn_constructor_args=[model], batch_size=1024, compute=pool, num_gpus=_GPUS)
    scored.write_parquet(f"{output}/predictions")
    return {"seconds": time.perf_counter() - started}


def train(rows: str, runs: str, epochs: str) -> dict[str, float]:
    """Train with one worker and a checkpoint an epoch; the first epoch does not count."""

    def worker() -> dict[str, float]:
        torch.set_num_threads(_CORES)  # Ray sets one, with which two cores train half as fast
        rates, first_row = list[float](), 0.0
        step = TrainingStep()
        step.objective = ray.train.torch.prepare_model(step.objective)
        shard = ray.train.get_dataset_shard("train")
        for epoch in range(int(epochs)):
            count, started = 0, time.perf_counter()
            for batch in shard.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=16 * BATCH):
                count += step(batch["image"], batch["digit"])
                first_row = first_row or time.time()
            rates.append(count / (time.perf_counter() - started))
            with tempfile.TemporaryDirectory() as folder:
                momenta = list(step.optimizer.state.values())
                state = {"model": step.model.state_dict(), "optimizer": momenta, "epochs": epoch + 1}
                torch.save(state, f"{folder}/state.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        return {"rows_per_second": float(np.mean(rates[1:])), "first_row": first_row}

    images = read(rows).map_batches(lambda batch: {"image": decode(batch), "digit": batch["digit"].astype(np.int64)})
    scaling, run = ray.train.ScalingConfig(use_gpu=bool(_GPUS)), ray.train.RunConfig(name="guide", storage_path=runs)
    trainer = ray.train.torch.TorchTrainer(worker, scaling_config=scaling, run_config=run, datasets={"train": images})
    return trainer.fit().return_value  # type: ignore[no-any-return]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    # The tasks that read and write, and the filter of a rerun, need CPUs beside actors on all cores: without, they wait for ever.
    ray.init(address="local", num_cpus=_CORES + 3, log_to_driver=False)
    print(json.dumps((train if what == "train" else score)(*arguments)))
