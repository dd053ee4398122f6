"""The finished model of a training: what its task has made of it at the end, and all about it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mnistsum_ray.errors import TaskError
from mnistsum_ray.model.calls import calling
from mnistsum_ray.model.device import describe_hardware
from mnistsum_ray.model.folder import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.model.inference import device_of
from mnistsum_ray.task import Evaluated, Findings, Task


@dataclass(frozen=True)
class FinishedModel:
    """A trained model, with what is known of it.

    Ray Train refuses tensors that a worker returns in a dict.
    """

    history: list[dict[str, Any]]  # lines of history.jsonl, one an epoch
    weights: Weights  # as `Task.calibrate` has left them
    description: dict[str, Any]  # contents of model.json
    findings: Findings
    hardware: dict[str, Any]
    precision: str  # `bf16` or `fp32`, of the training


def calibrate_model(task: Task, trained: nn.Module, validation: Evaluated) -> dict[str, Any]:
    """Let the task calibrate the network of the last epoch in place, with rows on the CPU.

    Returns what model.json has of it. The same network and rows give the same each time.
    """
    network = _on_cpu(task, copy_weights(trained))  # where the rows are
    with calling(task, "calibrate"):
        entries = dict(task.calibrate(network, validation))
        trained.load_state_dict(network.state_dict())
    return entries


def finish_model(
    task: Task,
    calibrated: nn.Module,
    analysed: dict[str, Evaluated],
    history: list[dict[str, Any]],
    precision: str,
    code: str,
    entries: dict[str, Any],
) -> FinishedModel:
    """Let the task analyse the final network, with held-out rows on the CPU.

    `entries` are more of model.json.
    """
    weights = copy_weights(calibrated)
    network = _on_cpu(task, weights)
    with calling(task, "finish"):
        findings = task.finish(network, analysed["validation"], analysed["test"])
    if checksum(copy_weights(network)) != checksum(weights):
        raise TaskError(f"task {task.name}: finish must not change the network: calibrate may")
    epoch, more = history[-1]["epoch"], entries | findings.model
    description = describe_model(task, weights, code, precision=precision, epoch=epoch, **more)
    used = describe_hardware(device_of(calibrated))
    return FinishedModel(history, weights, description, findings, used, precision)


def _on_cpu(task: Task, weights: Weights) -> nn.Module:
    """Return a network of its own, for code of the task that may change it."""
    network = task.network().eval()
    network.load_state_dict(weights)
    return network
