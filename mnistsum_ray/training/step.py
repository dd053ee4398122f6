"""One optimizer step of a worker: forward, backward, update."""

from collections.abc import Mapping
from functools import lru_cache

import ray.train.torch
import torch
from torch import Tensor

from mnistsum_ray.model.loss import Objective
from mnistsum_ray.model.network import TwoHeadCNN, distort, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.training.worker import Worker


class TrainingStep:
    """The objective in its DDP wrapper, compiled if wanted, and the optimizer.

    Args:
        model: its weights must have been restored before.
        optimizer: of the model's parameters.
        worker: its device, and how many workers there are.
        dtype: to compute in.
        label_smoothing: see `Objective`.
        compiled: compile the network; on a GPU PyTorch then records it as CUDA graphs.
    """

    def __init__(
        self,
        model: TwoHeadCNN,
        optimizer: MuonAdamW,
        worker: Worker,
        dtype: torch.dtype,
        *,
        label_smoothing: float,
        compiled: bool,
    ) -> None:
        self._optimizer, self._worker, self._dtype = optimizer, worker, dtype
        self.module = self._fast = ray.train.torch.prepare_model(
            Objective(model, label_smoothing, dtype),
            parallel_strategy_kwargs={"broadcast_buffers": False},  # its buffers are constants
        )
        if compiled:
            # A step of so small a network is bound by kernel launches, which CUDA graphs join.
            mode = "reduce-overhead" if worker.device.type == "cuda" else "default"
            self._fast = torch.compile(self.module, mode=mode, dynamic=False)

    def __call__(
        self, batch: Mapping[str, Tensor], dropout: Tensor | None, global_rows: int, learning_rate: float, *, full: bool
    ) -> Tensor:
        """Update the parameters.

        Args:
            batch: this worker's share of the global batch: `image`, `number`, `digit`, and `affine` if they are distorted.
            dropout: its `dropout_factors`.
            global_rows: rows of the batch over all workers.
            learning_rate: Muon's, see `MuonAdamW`.
            full: the share has the size that most have. A last share, which may be empty, is not compiled: a network that is
                compiled for any size would compute other bits.

        Returns:
            The mean of both heads' losses, without label smoothing, summed over this worker's rows. The next step may overwrite
            it.
        """
        self._optimizer.zero_grad()
        images = prepare_images(batch["image"])
        if "affine" in batch:
            images = distort(images, batch["affine"])
        objective = self._fast if full else self.module
        loss, reported = objective(images, batch["number"], batch["digit"], dropout)
        assert isinstance(reported, Tensor)
        # DDP averages over workers, whose shares differ by a row: this makes it the mean over the rows of the global batch.
        loss.backward(_constant(self._worker.world_size / global_rows, self._worker.device))
        self._optimizer.step(learning_rate, self._dtype)
        return reported


# Kept for full batches and for the last one of an epoch: a copy to a GPU waits for all that was launched before.
@lru_cache(maxsize=2)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)
