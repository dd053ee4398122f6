"""A function recorded as one CUDA graph: its kernels are launched all at once, and not one by one by Python.

Source: "Whole-network capture" in https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

_WARM_UP_CALLS: Final = 3
"""Calls before the recording: they compile, choose algorithms, and allocate workspaces and the optimizer's state."""


class CudaGraph:
    """Calls a function three times, then records it, and from then on replays the recording.

    Args:
        function: launches the same kernels in each call, never waits for the GPU, and keeps no tensor of one call for the next
            but those that it updates in place.
    """

    def __init__(self, function: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call or replay the function.

        Args:
            inputs: on the GPU, with the same names, shapes and dtypes in each call; they are copied.

        Returns:
            What the function returns. The next call overwrites it.
        """
        if self._calls < _WARM_UP_CALLS:
            self._calls += 1
            return self._call_on_side_stream(inputs)
        if self._graph is None:
            self._inputs = {name: torch.empty_like(value) for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            # Records, and computes nothing. Meanwhile other threads may use the GPU: one copies the next batches to it.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._function(self._inputs)
            self._graph = graph
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return self._output

    def _call_on_side_stream(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Not on the default stream: what autograd creates there could not be used in the recording."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            output = self._function(inputs)
        current.wait_stream(side)
        return output
