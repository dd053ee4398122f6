"""Pauses of Ray Data's scheduling loop while it has nothing to do."""

import time
from typing import Any, Final

from ray.data._internal.execution.execution_callback import ExecutionCallback

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.05


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
