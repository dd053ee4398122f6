"""Of a long error of Ray a user is shown one line: which one."""

from ray.exceptions import OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mnistsum_ray.errors import root_cause


def test_a_training_worker_that_was_killed_for_memory_is_said_to_be() -> None:
    """Ray's text goes on with pages of advice."""
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.\nAdvice.\n")
    lost = WorkerHealthCheckFailedError("A worker health check failed.", killed)
    assert root_cause(lost) == "Task was killed due to the node running low on memory."
    assert root_cause(lost) == root_cause(killed)
