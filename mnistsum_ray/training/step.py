"""One optimizer step of a worker: forward, backward, update. With `--compile`, the step of a single GPU is one CUDA graph."""

from collections.abc import Mapping
from functools import lru_cache

import ray.train.torch
import torch
from torch import Tensor

from mnistsum_ray.model.augmentation import distort
from mnistsum_ray.model.cuda_graph import CudaGraph
from mnistsum_ray.model.loss import Objective
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
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
        compiled: compile the network, and on a GPU record CUDA graphs.
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
        self._graph: CudaGraph | None = None
        if compiled:
            cuda, alone = worker.device.type == "cuda", worker.world_size == 1
            # A step of so small a network is bound by kernel launches. The graph of DDP's step would hold NCCL's calls too, so
            # with several workers only the network is recorded, by the compiler.
            self._fast = torch.compile(self.module, mode="reduce-overhead" if cuda and not alone else "default", dynamic=False)
            if cuda and alone:
                self._learning_rate = torch.zeros((), device=worker.device)
                self._graph = CudaGraph(lambda inputs: self._update(self._fast, inputs, self._learning_rate))

    def __call__(
        self, batch: Mapping[str, Tensor], dropout: Tensor | None, global_rows: int, learning_rate: float, *, full: bool
    ) -> Tensor:
        """Update the parameters.

        Args:
            batch: this worker's share of the global batch: `image`, `number`, `digit`, and `affine` if they are distorted.
            dropout: its `dropout_factors`.
            global_rows: rows of the batch over all workers.
            learning_rate: Muon's, see `MuonAdamW`.
            full: the share has the size that most have. A last share, which may be empty, is neither compiled nor recorded: a
                network that is compiled for any size would compute other bits.

        Returns:
            The mean of both heads' losses, without label smoothing, summed over this worker's rows. The next step may overwrite
            it.
        """
        inputs = {name: batch[name] for name in ("image", "number", "digit", "affine") if name in batch}
        # DDP averages over workers, whose shares differ by a row: this makes it the mean over the rows of the global batch.
        inputs["scale"] = _constant(self._worker.world_size / global_rows, self._worker.device)
        if dropout is not None:
            inputs["dropout"] = dropout
        if not full:
            return self._update(self.module, inputs, learning_rate)
        if self._graph is None:
            return self._update(self._fast, inputs, learning_rate)
        self._learning_rate.fill_(learning_rate)
        return self._graph(inputs)

    def _update(self, objective: torch.nn.Module, inputs: Mapping[str, Tensor], learning_rate: float | Tensor) -> Tensor:
        self._optimizer.zero_grad()
        images = prepare_images(inputs["image"])
        if "affine" in inputs:
            images = distort(images, inputs["affine"])
        loss, reported = objective(images, inputs["number"], inputs["digit"], inputs.get("dropout"))
        assert isinstance(reported, Tensor)
        loss.backward(inputs["scale"])
        self._optimizer.step(learning_rate, self._dtype)
        return reported


# Kept for full batches and for the last one of an epoch: a copy to a GPU waits for all that was launched before.
@lru_cache(maxsize=2)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)
