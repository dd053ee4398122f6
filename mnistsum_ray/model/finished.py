"""The finished model of a training: what its task has made of it at the end, and all about it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

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
    weights: Weights  # as `Task.finish` has left them
    description: dict[str, Any]  # contents of model.json
    findings: Findings
    hardware: dict[str, Any]
    precision: str  # `bf16` or `fp32`, of the training


def finish_model(
    task: Task,
    trained: nn.Module,
    validation: Evaluated,
    test: Evaluated,
    history: list[dict[str, Any]],
    precision: str,
    code: str,
) -> FinishedModel:
    """Let the task finish the network of the last epoch, with held-out rows on the CPU.

    The same trained network and rows give the same finished one each time.
    """
    # A copy on the CPU, where the rows are. `finish` may change the one that it gets.
    network = task.network().eval()
    network.load_state_dict(copy_weights(trained))
    # Two runs are compared by these bits, those before calibration.
    trained_sha256 = checksum(copy_weights(network))
    with calling(task, "finish"):
        findings = task.finish(network, validation, test)
    weights, last = copy_weights(network), history[-1]
    description = describe_model(
        task,
        weights,
        code,
        precision=precision,
        epoch=last["epoch"],
        validation=last["validation"],
        test=last["test"],
        trained_sha256=trained_sha256,
        **findings.model,
    )
    used = describe_hardware(device_of(trained))
    return FinishedModel(history, weights, description, findings, used, precision)
