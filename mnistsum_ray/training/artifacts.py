"""Files of a run folder for people and other programs: manifest, history, model, pictures, report."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import yaml

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.folder import DESCRIPTION_FILE, WEIGHTS_FILE
from mnistsum_ray.reporting.report import REPORT, draw_pictures, report_page, versions
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.analysis import FinishedModel
from mnistsum_ray.training.preflight import TrainingRun


def build_manifest(run: TrainingRun, source: Source, sha256: str, plan: WorkerPlan) -> dict[str, Any]:
    """The manifest of a starting run: config, versions, workers, and the data with their fingerprint.

    `source` is without its bad rows.
    """
    # The stored config of a run that is resumed names the data that `--data auto` found, so only
    # the first manifest says that it is not full MNIST.
    notice = source.notice or (run.stored or {}).get("data", {}).get("notice", "")
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json", exclude={"resume"}),
        "versions": versions(),
        "workers": plan.describe(),
        "num_workers": plan.worker_range,
        "use_gpu": plan.use_gpu,
        "data": {
            "source": source.name,
            "location": source.location,
            "notice": notice,
            "sha256": sha256,
            "train_rows": len(source.train),
            "validation_rows": len(source.validation),
            "test_rows": len(source.test),
            "bad_rows": {"rows": source.bad.total} | asdict(source.bad),
        },
    }


def write_config(run: TrainingRun, plan: WorkerPlan, threads: int | None, precision: str) -> None:
    """Write config.yaml, the config of a run with what it has chosen: `--config` takes it for another run of the same kind.

    That one has a name and a place of its own.
    """
    low, high = plan.worker_range
    chosen = {
        "num_workers": low if low == high else (low, high),
        "use_gpu": plan.use_gpu,
        "threads": threads,
        "precision": precision,
    }
    config = run.config.model_copy(update=chosen).model_dump(mode="json", exclude={"storage_path", "name", "resume"})
    text = "# mnistsum train --config FILE trains the same again\n"
    text += yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (run.folder / "config.yaml").write(text.encode())


def check_data(run: TrainingRun, sha256: str) -> None:
    """Check that the data, which have this fingerprint, are those of the run that is resumed; else raise RequestError."""
    if run.stored is None:
        return
    then = run.stored["data"]
    if sha256 != then["sha256"]:
        raise RequestError(
            f"--resume: the data are not those of the run (SHA-256 {sha256[:12]}…, the run has "
            f"{str(then['sha256'])[:12]}… from {then['location']}); name the same data, or start another run"
        )


def write_history(folder: Location, history: list[dict[str, Any]]) -> None:
    """Write history.jsonl and TensorBoard's event files of the epochs, lines of history.jsonl."""
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import, and is needed after the first epoch only

    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (folder / "history.jsonl").write(lines.encode())
    tensorboard.write_epochs(folder, history)


def write_report(
    run: TrainingRun,
    manifest: dict[str, Any],
    card: dict[str, Any],
    finished: FinishedModel,
    say: Callable[[str], None],
) -> list[str]:
    """Write pictures, report and TensorBoard's last event file; return the names of the files that MLflow should get."""
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import

    analysis = manifest["error_analysis"]
    wanted = {
        "history.png": (finished.history, card),
        "confusion.png": (analysis["confusion"],),
        "mistakes.png": (analysis["mistakes"], finished.mistake_images),
        "reliability.png": (analysis["probabilities"],),
    }
    drawn = draw_pictures(wanted, say)
    for name, data in drawn.items():
        (run.folder / name).write(data)
    page = report_page(str(run.config.name), manifest, card, finished.history, drawn)
    (run.folder / REPORT).write(page.encode())
    tensorboard.write_final(run.folder, finished.history[-1]["epoch"], card)
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in (WEIGHTS_FILE, DESCRIPTION_FILE))]
