"""TODO training.events"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.resources import describe_wait
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.progress import SILENCE_SECONDS

if TYPE_CHECKING:
    pass


@contextmanager
def event_queue(console: Console, on_epoch: Callable[[dict[str, Any]], None]) -> Iterator[Queue]:
    """A queue whose events the console shows until the block ends; `on_epoch` gets the lines of history.jsonl."""
    # On this node, so that it is not lost with another.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    ended, failed = threading.Event(), threading.Event()

    def follow() -> None:
        silent = 0
        while True:
            try:
                event = queue.get(timeout=SILENCE_SECONDS)
            except ray.exceptions.RayError:  # a busy node does not answer for a moment, or it was ended before all was shown
                if ended.wait(1.0):
                    return
                continue
            except Empty:
                silent += SILENCE_SECONDS
                with suppress(ray.exceptions.RayError):  # a cluster that has ended; `fit` says so
                    console.say(f"no word from the workers for {silent} s: {describe_wait()}")
                continue
            if event is None or failed.is_set():
                return
            silent = 0
            console.show(event)
            if event["kind"] == "epoch":
                on_epoch({key: value for key, value in event.items() if key != "kind"})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
    except BaseException:
        failed.set()  # what is still to be shown is not waited for
        raise
    finally:
        queue.actor.put.remote(None)
        thread.join(timeout=10)
        ended.set()
        queue.shutdown(force=True)
        thread.join(timeout=5)  # it must not ask for events of a cluster that this process has left
