"""The files that a run leaves: config, history, model, pictures, report, manifest."""

import json
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import yaml

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, RunError, counted, shell_command
from mnistsum_ray.model.folder import write_model
from mnistsum_ray.reporting.console import accuracies
from mnistsum_ray.reporting.report import REPORT, versions, write_report
from mnistsum_ray.reporting.results import MANIFEST, HeldOutMetrics, SplitRows, TrainResult
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.analysis import FinishedModel
from mnistsum_ray.training.preflight import TrainingRun


@dataclass
class RunRecord:
    """Writes the files of a run, whose folder is held by `lock`; `say` gets lines."""

    run: TrainingRun
    lock: FolderLock
    say: Callable[[str], None]
    plan: WorkerPlan
    threads: int | None
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """What the file has since `begin`."""

    def begin(self, source: Source, sha256: str, init_from: dict[str, str] | None) -> None:
        """Write the manifest of a run that begins or goes on.

        `source` is without its bad rows, `sha256` its fingerprint. It is a RequestError if they are
        not those of the run that goes on.
        """
        run, plan = self.run, self.plan
        stored = run.stored["data"] if run.stored else None
        if stored and stored["sha256"] != sha256:
            raise RequestError(
                f"--resume: the data are not those of the run (SHA-256 {sha256[:12]}…, the run has "
                f"{stored['sha256'][:12]}… from {stored['location']}); name the same data, or "
                "start another run"
            )
        # Results of a run that is resumed stay until there are new ones.
        self.manifest = (run.stored or {}) | {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": run.config.model_dump(mode="json", exclude={"resume"}),
            "versions": versions(),
            "workers": plan.describe(),
            "num_workers": plan.worker_range,
            "threads": self.threads,
            "data": {
                "source": source.name,
                "location": source.location,
                # The config of a run that is resumed names the data that `--data auto` found, so
                # only the first manifest says that it is not full MNIST.
                "notice": source.notice or (stored["notice"] if stored else ""),
                "sha256": sha256,
                "train_rows": len(source.train),
                "validation_rows": len(source.validation),
                "test_rows": len(source.test),
                "bad_rows": {
                    "rows": source.bad.total,
                    "reasons": source.bad.reasons,
                    "examples": source.bad.examples,
                },
            },
        }
        if init_from:
            self.manifest["init_from"] = init_from
        file = run.folder / MANIFEST
        write = file.write if run.config.resume else file.create
        write(self.manifest)

    def write_status(self, status: str) -> None:
        """Write how the run ends, unless it is finished; what fails here is left out."""
        if self.manifest["status"] == "finished":
            return
        with suppress(OSError, RunError, KeyboardInterrupt):
            self.lock.check()
            (self.run.folder / MANIFEST).write(self.manifest | {"status": status})

    def _write_config(self, precision: str) -> None:
        """Write config.yaml: the config of the run, with what it has chosen, for another run."""
        low, high = self.plan.worker_range
        chosen = {
            "num_workers": low if low == high else (low, high),
            "use_gpu": self.plan.use_gpu,
            "threads": self.threads,
            "precision": precision,
        }
        config = self.run.config.model_copy(update=chosen)
        entries = config.model_dump(mode="json", exclude={"storage_path", "name", "resume"})
        text = "# mnistsum train --config FILE trains the same again\n"
        text += yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        (self.run.folder / "config.yaml").write(text.encode())

    def add_epoch(self, line: dict[str, Any]) -> None:
        """Write history.jsonl with one more epoch."""
        self.history = [*self.history[: line["epoch"] - 1], line]
        self._write_history()

    def _write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        (self.run.folder / "history.jsonl").write(lines.encode())

    def publish(self, finished: FinishedModel, started: float) -> TrainResult:
        """Write the model, the report and, last, the manifest: then the run is finished.

        `started` is of `time.monotonic`.
        """
        folder, description = self.run.folder, finished.description
        self.history = history = finished.history
        self.lock.check()
        write_model(folder / "model", finished.weights, description)
        self._write_config(finished.manifest["precision"])
        self._write_history()
        # The first epoch includes one-time work such as loading kernels.
        steady = history[1:] or history
        speeds = [line["rows_per_second"] for line in steady]
        result = TrainResult(
            run=folder.display,
            model=(folder / "model").display,
            parameters=description["parameters"],
            data=SplitRows(**self.manifest["data"]),  # it takes its four fields
            test=HeldOutMetrics(**description["test"]),
            images_per_second=round(fmean(speeds, [line["seconds"] for line in steady]), 1),
            seconds=round(time.monotonic() - started, 1),
        )
        manifest = self.manifest | finished.manifest
        manifest["status"] = "finished"
        manifest["metrics"] = result.line()
        seconds = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
        manifest["training_seconds"] = round(seconds, 1)
        write_report(folder, manifest, description, history, finished.mistake_images, self.say)
        rows = f"{counted(description['test']['rows'], 'row')}, all {NUMBERS} numbers"
        self.say(f"test: {accuracies(description['test'])} ({rows})")
        self.say(f"report: {(folder / REPORT).display}")
        command = f"{shell_command('score')} --model {shlex.quote(folder.display)}"
        self.say(f"score with it: {command} --input PAIRS --output SCORED")
        self.lock.check()
        self.manifest = manifest  # from here on the run is neither stopped nor failed
        (folder / MANIFEST).write(manifest)
        return result
