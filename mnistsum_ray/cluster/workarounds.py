"""What Ray 2.60.0 does wrong and costs a user data or minutes, worked around with private names.

Each works without its name too. ruff refuses private names elsewhere.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

import ray
import ray.exceptions

_GONE: Final = (ImportError, AttributeError, TypeError)  # where Ray has renamed something

_DATA_ACTORS: Final = {
    "execution.node_trackers.actor_location": "get_or_create_actor_location_tracker",
    "cluster_autoscaler": "get_or_create_autoscaling_coordinator",
    "stats": "get_or_create_stats_actor",
    "stats_summary_actor": "_get_or_create_stats_summary_actor",
    "usage.actor": "get_or_create_usage_collection_actor",
}
"""Functions that create detached actors, by their modules in `ray.data._internal`."""


def last_cluster_address() -> str | None:
    """HOST:PORT of the cluster that `ray start` started last on this machine, running or not.

    `ray.init` takes it from the same file, and tries for minutes where that cluster has crashed.
    """
    with suppress(*_GONE):
        return ray._private.utils.read_ray_address() or None  # noqa: TID251
    return None


def detached_data_actors() -> None:
    """Create Ray Data's five detached actors on this node, which is the driver's.

    The first process that runs a Dataset creates them on its node, and they stay for ever. In a
    training that is a worker: an autoscaler could never remove its node, a GPU that is paid for.
    """
    for module, name in _DATA_ACTORS.items():
        with suppress(*_GONE):
            getattr(import_module(f"ray.data._internal.{module}"), name)()


def in_order(dataset: Any) -> Any:
    """A Dataset whose rows come in their order; by default it is that of the fastest task."""
    with suppress(*_GONE):
        dataset = dataset.copy(dataset, _deep_copy=True)  # the given one keeps its options
    dataset.context.execution_options.preserve_order = True
    return dataset


def make_interruptible(trainer: Any) -> Callable[[], None]:
    """Leave SIGINT to this process during `trainer.fit()`; return a function that ends its workers.

    Ray Train's own handler for SIGINT stays for good, and ends the process with exit code 0.
    """
    controllers: list[Any] = []
    # Ray passes its controller here, in place of registering a handler.
    trainer._register_sigint_handler = controllers.append

    def abort() -> None:
        for controller in controllers:
            try:
                ray.get(controller.abort.remote(), timeout=3)
            except ray.exceptions.RayError:  # it has ended, or does not answer
                ray.kill(controller)  # its workers end with it

    return abort


class PatientExecution:
    """Callback of Ray Data that sleeps after idle steps of its scheduling loop.

    Once as many rows wait as may, the loop runs without a pause, in a thread of the training
    process: without this, rows of five million were trained at 610 a second on two cores, and not
    at 1,500. There is no option against it.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._pause = 0.001

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None  # the other hooks of `ExecutionCallback`, a private class

    def on_execution_step(self, executor: Any) -> None:
        """Called after each step; in an idle one no task was started or returned anything."""
        with suppress(*_GONE):
            metrics = [operator.metrics for operator in executor._topology]
            done = [(one.num_tasks_submitted, one.num_task_outputs_generated) for one in metrics]
            if done != self._seen:
                self._seen, self._pause = done, 0.001
                return
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, 0.05)
