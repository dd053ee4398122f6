"""Hooks into Ray Train: an interruptible trainer, and what a failed trainer leaves behind."""

from contextlib import suppress
from typing import Any, Final

import ray
import ray.train
import ray.train.torch
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_ABORT_SECONDS: Final = 3.0


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer that leaves SIGINT to this process, and its workers in peace.

    Ray Train 2.60 has no options against two of its habits; tests/cluster/test_workarounds.py fails when a name changes.

    - `_register_sigint_handler` would install a handler for SIGINT for good, which ends the process with exit code 0.
    - `PlacementGroupCleanerCallback` asks each second whether the controller is alive, and it asks any Ray cluster that runs on
      this machine. Another one does not know the controller; then the workers are killed. Without it nothing is left behind:
      a placement group ends with the job that has created it.
    """

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers, if they have been started; `fit` then raises RayActorError."""
        if self.controller is not None:
            with suppress(Exception):  # workers that do not end now end with this process
                ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)


def placement_groups() -> set[str]:
    """Ids of the placement groups of this job, whose own id is their end."""
    job = ray.get_runtime_context().get_job_id()
    return {name for name, entry in placement_group_table().items() if name.endswith(job) and entry["state"] != "REMOVED"}


def remove_placement_groups(but: set[str]) -> None:
    """Remove the placement groups of this job, but for some. Ray Train 2.60 leaves that of workers that fail in
    `init_process_group`, and the next workers would wait for its resources."""
    for name in placement_groups() - but:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
