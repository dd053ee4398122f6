"""How a training ends that Ray Train gives up: whether to begin again, and what to say."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import ray
import ray.data.exceptions
import ray.exceptions
import ray.train

from mnistsum_ray.cluster.resources import WorkerPlan, shortage
from mnistsum_ray.errors import (
    CheckpointError,
    RepeatingError,
    RequestError,
    RunError,
    StorageError,
    TryAgainError,
    counted,
    ended_by_storage,
    one_line,
    root_cause,
)
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.training.run import TrainRequest

_FAILED_START: Final = "failed to initialize"
_START_TIMED_OUT: Final = "startup timed out"
"""What Ray Train 2.60 says of two errors whose types are private; test_faults.py and test_train.py
would see other words."""


@contextmanager
def errors_in_one_line(console: Console, how_to_go_on: str) -> Iterator[None]:
    """Raise errors of Ray and of the storage in the block as a RunError that says how to go on."""
    try:
        yield
    except ray.exceptions.RayError as error:  # some are OSErrors too
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {how_to_go_on}") from error
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise TryAgainError(f"Ray Data has read no row for long; {how_to_go_on}") from error
    except StorageError as error:
        raise ended_by_storage(error, how_to_go_on) from error


def is_worth_a_try(error: ray.train.TrainingFailedError) -> bool:
    """Whether Ray Train gave up on a failure that it does not count against `max_failures`.

    A worker has died a moment after the start of its group, which reaches us as the error of an
    actor or of a task. Or Arrow could not write the list of checkpoints, after 6 s. Or a worker has
    died while its group started. Or a worker could not read the checkpoint: another attempt looks
    for the newest whole one, which Ray Train does not.
    """
    cause = getattr(error, "controller_failure", None)
    known = isinstance(cause, ray.exceptions.RayError | CheckpointError)
    if known or type(cause) is OSError:  # as Arrow's are
        return True
    return _FAILED_START in str(cause)  # not of `error`, which may quote a worker's own words


@contextmanager
def ctrl_c_as_before() -> Iterator[None]:
    """Restore the handler of SIGINT when Ray Train has replaced it, in the main thread.

    Ray's ends the workers and then the process, with exit code 0: that becomes an interrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def explain_end(
    error: Exception, request: TrainRequest, plan: WorkerPlan, wait_seconds: float, console: Console
) -> RunError | RequestError:
    """Why Ray Train has given up, in one line."""
    resume = request.how_to_resume
    if isinstance(error, ray.train.WorkerGroupError):
        failures = counted(request.config.max_failures + 1, "failure")
        return RunError(f"gave up after {failures} of workers, see above; {resume}")
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, RepeatingError):
        return RunError(str(cause))
    if isinstance(cause, StorageError):
        return ended_by_storage(cause, resume)
    if type(cause).__name__ == "InsufficientClusterResourcesError":  # its type is private too
        return RequestError(f"--num-workers {plan.least}: {one_line(cause)}")
    if _START_TIMED_OUT in str(cause):
        return TryAgainError(f"{shortage(plan.needed, wait_seconds)}; {resume}")
    console.say_lines(str(error))
    return RunError(f"{type(cause).__name__}: {root_cause(cause)}; {resume}")
