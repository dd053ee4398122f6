"""Options of Ray Data for the app's own datasets. Datasets of the user, in the same process, keep theirs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ray.data import DataContext

from mnistsum_ray.cluster.ray_internals import PatientExecution

_LOCK: Final = threading.RLock()
"""The current DataContext belongs to the process and not to a thread, and datasets are created in several threads."""


@contextmanager
def ray_data_options(*, preserve_order: bool, object_store_bytes: int | None = None) -> Iterator[None]:
    """Set options for the datasets that are created in the block, which copy them. A generator must not yield inside the block.

    With `preserve_order` blocks come in the order of their input. No task is started, and the execution sleeps, while blocks of
    `object_store_bytes` wait for the consumer; None: half of the store.
    """
    with _LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = preserve_order
        if object_store_bytes is not None:
            context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PatientExecution]
            limits = context.execution_options.resource_limits
            context.execution_options.resource_limits = limits.copy(object_store_memory=object_store_bytes)
        with DataContext.current(context):
            yield
