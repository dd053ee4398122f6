"""Options of Ray Data for the datasets of this program."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_CONTEXT_LOCK: Final = threading.RLock()
"""The current DataContext is the process's, and datasets are created in several threads."""


@contextmanager
def ray_data_options(
    *, preserve_order: bool, object_store_bytes: int | None = None, block_bytes: int | None = None
) -> Iterator[None]:
    """Set options for the datasets that are created in the block; those of the user keep theirs.

    A generator must not yield inside. No task is started, and the execution sleeps, while blocks of
    `object_store_bytes` wait for the consumer; None: half of the store. What a task yields is
    passed on once it has `block_bytes`.
    """
    from ray.data import DataContext

    from mnistsum_ray.cluster.workarounds import PatientExecution

    with _CONTEXT_LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        options = context.execution_options
        options.preserve_order = preserve_order
        if block_bytes is not None:
            context.target_max_block_size = block_bytes
        if object_store_bytes is not None:
            context.custom_execution_callback_classes += [PatientExecution]
            limits = options.resource_limits.copy(object_store_memory=object_store_bytes)
            options.resource_limits = limits
        with DataContext.current(context), warnings.catch_warnings():
            # Ray 2.60 has no other way to limit how often a process is started again.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            yield
