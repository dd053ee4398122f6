"""How a training ends that Ray Train gives up, in one line, and with which exit code."""

import io
from pathlib import Path

import pytest
import ray.train

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RunError, TryAgainError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.results import MANIFEST
from mnistsum_ray.training import job
from mnistsum_ray.training.run import TrainRequest, check_request

PLAN = WorkerPlan(1, 1, {"CPU": 2.0}, 2)


@pytest.fixture
def request_of_run(tmp_path: Path) -> TrainRequest:
    request = check_request(TrainConfig(data="sample", storage_path=str(tmp_path), name="mine"))
    (request.folder / MANIFEST).write({})
    return request


def explained(request: TrainRequest, error: Exception) -> Exception:
    return job._explained(error, request, PLAN, 30.0, Console(io.StringIO()))


def test_failures_are_counted_and_the_command_that_resumes_is_named(
    request_of_run: TrainRequest,
) -> None:
    error = explained(request_of_run, ray.train.WorkerGroupError("", {0: ValueError("x")}))
    assert type(error) is RunError
    said = "gave up after 4 failures of workers, see above; checkpoints are kept, and this command"
    assert str(error).startswith(said)
    assert str(error).endswith("--name mine --resume")


def test_a_storage_that_refuses_is_asked_once_more_and_its_answer_said(
    request_of_run: TrainRequest, tmp_path: Path
) -> None:
    """Keys that have expired: to Ray Train that is a failure of workers like any other."""
    (tmp_path / "mine" / MANIFEST).unlink()
    error = explained(request_of_run, ray.train.WorkerGroupError("", {0: OSError("status 400")}))
    assert type(error) is TryAgainError
    assert str(error).startswith(f"{tmp_path}/mine/{MANIFEST}: is not there")
    assert "; checkpoints are kept" in str(error)
