"""What is written about a training run: config, history, model, report and manifest."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Final

import yaml

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.errors import MissingFileError, RunError, shell_command
from mnistsum_ray.model.finished import FinishedModel
from mnistsum_ray.model.folder import LoadedModel, write_model
from mnistsum_ray.reporting.console import describe_metrics
from mnistsum_ray.reporting.report import REPORT, how_to_score, versions, write_report
from mnistsum_ray.reporting.results import MANIFEST, HeldOutMetrics, SplitRows, TrainResult
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import BUILT_IN
from mnistsum_ray.task_loader import code_of
from mnistsum_ray.training.request import TrainRequest
from mnistsum_ray.training.rows import Rows

HISTORY: Final = "history.jsonl"

_NOT_OF_THE_RUN: Final = {"resume"}
"""Fields that say how a run is resumed, not what it is."""


def check_storage(run: Location) -> None:
    """Raise StorageError if the folder of a run cannot be written now, also after 50 s of trying.

    Keys that have expired look to Ray Train like workers that fail.
    """
    probe = run / ".probe"  # a file of its own, since the driver may be writing the manifest now
    probe.write({})
    probe.delete()


@dataclass
class RunRecord:
    """Writes config.yaml, history.jsonl and manifest.json of a run."""

    request: TrainRequest
    plan: WorkerPlan
    history: list[dict[str, Any]] = field(default_factory=list)  # a line of history.jsonl an epoch
    manifest: dict[str, Any] = field(default_factory=dict)  # what the file has since `begin`

    def begin(self, rows: Rows, init_model: LoadedModel | None) -> None:
        """Write the manifest of a run that begins or is resumed."""
        request, plan, source = self.request, self.plan, self.request.source
        # Results of a run that is resumed stay until there are new ones.
        self.manifest = request.stored | {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": self._describe_task(),
            "config": request.config.model_dump(mode="json", exclude=_NOT_OF_THE_RUN),
            "versions": versions(),
            "workers": str(plan),
            "threads": plan.threads,
            "data": {
                "source": source.name,
                "location": source.location,
                # The config of a run that is resumed names the data that `--data auto` found, so
                # only the first manifest says that it is a sample.
                "notice": source.notice or request.stored.get("data", {}).get("notice", ""),
                "fingerprint": rows.fingerprint,
                **{f"{split}_rows": totals.rows for split, totals in rows.totals.items()},
                "bad_rows": {"rows": rows.rejected.total, **vars(rows.rejected)},
            },
        }
        if init_model is not None:
            sha256 = init_model.description["sha256"]
            self.manifest["init_from"] = {"model": request.config.init_from, "sha256": sha256}
        file = request.folder / MANIFEST
        if not request.config.resume:
            file.create(self.manifest)
            return
        file.write(self.manifest)
        with suppress(MissingFileError):  # before the first epoch
            lines = (request.folder / HISTORY).read_bytes().splitlines()
            self.history = [json.loads(line) for line in lines]

    def _describe_task(self) -> dict[str, Any]:
        """Return name and code of the task; and codes that earlier parts of the run had."""
        task, stored = type(self.request.task), self.request.stored.get("task", {})
        codes = [*stored.get("earlier_codes", []), stored.get("code")]
        earlier = [code for code in codes if code not in (None, code_of(task))]
        described: dict[str, Any] = {"name": task.name, "code": code_of(task)}
        return described | ({"earlier_codes": earlier} if earlier else {})

    def write_status(self, status: str) -> None:
        """Write how the run ends, unless it is finished; an error here must not hide the reason."""
        if self.manifest["status"] == "finished":
            return
        file = self.request.folder / MANIFEST
        with suppress(OSError, RunError, ValueError, KeyboardInterrupt):
            # In a bucket another run of this name may have begun, or have finished.
            if file.read_json().get("started") == self.manifest["started"]:
                file.write(self.manifest | {"status": status})

    def add_epoch(self, line: dict[str, Any]) -> None:
        """Write history.jsonl with one more epoch, unless the whole of it was published."""
        if self.manifest["status"] == "finished":
            return
        self.history = [*self.history[: line["epoch"] - 1], line]
        self._write_history()

    def _write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        (self.request.folder / HISTORY).write(lines.encode())

    def _write_config(self, precision: str) -> None:
        """Write config.yaml: the config of the run, with what it has chosen, for another run."""
        plan = self.plan
        chosen = {
            "num_workers": plan.num_workers,
            "use_gpu": plan.use_gpu,
            "threads": plan.threads,
            "precision": precision,
        }
        config = self.request.config.model_copy(update=chosen)
        # Not the task: no code is loaded because a file says so.
        left_out = {"task", "storage_path", "name", *_NOT_OF_THE_RUN}
        entries = config.model_dump(mode="json", exclude=left_out)
        of_task = "" if config.task == BUILT_IN else f" --task {config.task}"
        text = f"# mnistsum train{of_task} --config FILE trains the same again\n"
        text += yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        (self.request.folder / "config.yaml").write(text.encode())

    def publish(
        self, finished: FinishedModel, seconds: float, say: Callable[[str], None]
    ) -> TrainResult:
        """Write the model, the report and, last, the manifest: then the run is finished.

        `seconds` is how long the job has taken.
        """
        folder, description = self.request.folder, finished.description
        self.history = history = finished.history
        write_model(folder / "model", finished.weights, description)
        self._write_config(finished.precision)
        self._write_history()
        # The first epoch includes one-time work such as loading kernels.
        steady = history[1:] or history
        speeds = [line["rows_per_second"] for line in steady]
        result = TrainResult(
            run=folder.display,
            model=(folder / "model").display,
            parameters=description["parameters"],
            data=SplitRows(**self.manifest["data"]),  # drops other keys
            test=HeldOutMetrics(**description["test"]),
            rows_per_second=round(fmean(speeds, [line["seconds"] for line in steady]), 1),
            seconds=round(seconds, 1),
        )
        training = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
        manifest = self.manifest | {
            "status": "finished",
            "metrics": result.line(),
            "training_seconds": round(training, 1),
            "precision": finished.precision,
            "hardware": finished.hardware,
            **finished.findings.manifest,
        }
        write_report(folder, manifest, description, history, finished.findings, say)
        if finished.findings.notice:
            say(finished.findings.notice)
        say(f"test: {describe_metrics(description['test'])}")
        say(f"report: {(folder / REPORT).display}")
        command = how_to_score(shell_command("score"), self.request.config.task, folder.display)
        say(f"score with it: {command}")
        self.manifest = manifest  # before the write, which may be done when a signal comes
        (folder / MANIFEST).write(manifest)
        return result
