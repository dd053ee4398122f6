"""Workers and precision of a scoring run."""

from collections.abc import Callable

import torch

from mnistsum_ray.cluster.resources import WorkerPlan, WorkerRequest, reserve
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.model.device import faster_with_bf16


def worker_request(config: ScoreConfig) -> WorkerRequest:
    """The pool of workers that a run asks for. int8 runs on CPUs."""
    workers = (config.num_workers, config.num_workers) if config.num_workers else None
    return WorkerRequest(workers, False if config.precision == "int8" else config.use_gpu, config.wait_seconds)


def allocate_resources(config: ScoreConfig, say: Callable[[str], None]) -> tuple[WorkerPlan, str]:
    """Reserve workers; return them, and the configured precision or else the faster one of `bf16` and `fp32`.

    Raises:
        RequestError: see `reserve`.
    """
    plan = reserve(worker_request(config), say)
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = plan.gpu.bf16 if plan.gpu else faster_with_bf16(torch.device("cpu"))
    return plan, config.precision or ("bf16" if bf16 else "fp32")
