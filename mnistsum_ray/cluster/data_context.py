"""Options of Ray Data for the app's own datasets. Datasets of the user, in the same process, keep theirs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

_LOCK: Final = threading.RLock()
"""The current DataContext belongs to the process and not to a thread, and datasets are created in several threads."""

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.05


@contextmanager
def ray_data_options(
    *, preserve_order: bool, target_max_block_size: int | None = None, object_store_bytes: int | None = None
) -> Iterator[None]:
    """Set options for the datasets that are created in the block. They keep the options after it.

    A Dataset copies the DataContext that is current when it is created, so only the creation has to be in the block. A generator
    must not yield inside the block: its caller would have the options until the next item.

    Args:
        preserve_order: return blocks in the order of their input.
        target_max_block_size: in bytes; None keeps Ray's default.
        object_store_bytes: memory of blocks that wait for the consumer, above which no task is started; the execution then sleeps
            until blocks are taken. None: half of the store.
    """
    with _LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = preserve_order
        if target_max_block_size is not None:
            context.target_max_block_size = target_max_block_size
        if object_store_bytes is not None:
            context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PatientExecution]
            limits = context.execution_options.resource_limits
            context.execution_options.resource_limits = limits.copy(object_store_memory=object_store_bytes)
        with DataContext.current(context):
            yield


class PatientExecution(ExecutionCallback):
    """Sleeps after steps of the scheduling loop in which no task was started and no task returned anything.

    When its consumer is slower than its tasks, Ray Data 2.60 runs its loop without a pause: `ray.wait` returns at once while a
    task has a result that may not be taken yet, and is not called while no task runs. The loop is a thread of the training
    process, and takes a third of the speed of training on two cores. Ray Data has no option against it. `ExecutionCallback`,
    `_topology` and the metrics are private; `tests/cluster/test_ray_internals.py` uses them with the installed Ray.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._pause = _FIRST_PAUSE_SECONDS

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each step, in the thread of the execution."""
        metrics = [operator.metrics for operator in executor._topology]
        progress = [(metric.num_tasks_submitted, metric.num_task_outputs_generated) for metric in metrics]
        if progress != self._seen:
            self._seen, self._pause = progress, _FIRST_PAUSE_SECONDS
            return
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
