"""Files of a run folder for people and other programs: manifest, history, model, pictures, report."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch
import yaml

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, counted, one_line, shell_command
from mnistsum_ray.model.folder import DESCRIPTION_FILE, WEIGHTS_FILE, write_model
from mnistsum_ray.reporting.console import accuracies
from mnistsum_ray.reporting.report import REPORT, draw_pictures, epoch_seconds, report_page, versions
from mnistsum_ray.reporting.results import HeldOutMetrics, SplitRows, TrainResult
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


def write_results(
    run: TrainingRun,
    manifest: dict[str, Any],
    finished: FinishedModel,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[TrainResult, dict[str, Any], list[str]]:
    """Write the model, and what is said of it: all but the manifest, which makes the run finished.

    Returns:
        The job's result, the manifest, and the names of the files that MLflow should get.
    """
    card = finished.description
    weights = {name: torch.tensor(value) for name, value in finished.weights.items()}
    write_model(run.folder / "model", weights, card)
    write_history(run.folder, finished.history)
    # The first epoch includes one-time work such as loading kernels.
    steady = finished.history[1:] or finished.history
    speed = fmean((line["rows_per_second"] for line in steady), (line["seconds"] for line in steady))
    summary = TrainResult(
        run=run.folder.display,
        model=(run.folder / "model").display,
        parameters=card["parameters"],
        data=SplitRows(**manifest["data"]),
        test=HeldOutMetrics(**card["test"]),
        images_per_second=round(speed, 1),
        seconds=round(seconds, 1),
    )
    training_seconds = round(sum(map(epoch_seconds, finished.history)), 1)
    complete = manifest | finished.manifest
    complete |= {"status": "finished", "metrics": summary.line(), "training_seconds": training_seconds}
    files = _write_report(run, complete, finished, say)
    say(f"test: {accuracies(card['test'])} ({counted(card['test']['rows'], 'row')}, all {NUMBERS} numbers)")
    say(f"report: {(run.folder / REPORT).display}")
    say(f"score with it: {shell_command('score')} --model {shlex.quote(run.folder.display)} --input PAIRS --output SCORED")
    return summary, complete, files


def _write_report(run: TrainingRun, manifest: dict[str, Any], finished: FinishedModel, say: Callable[[str], None]) -> list[str]:
    """Write pictures, report and TensorBoard's last event file; return the names of the files for MLflow."""
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import

    analysis = manifest["error_analysis"]
    card = finished.description
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


def log_to_mlflow(
    run: TrainingRun,
    manifest: dict[str, Any],
    finished: FinishedModel,
    files: list[str],
    say: Callable[[str], None],
) -> None:
    """Log a finished run to MLflow; a line says where, or why not."""
    uri = run.config.mlflow
    try:
        from mnistsum_ray.reporting.mlflow import log_run  # needs the extra `mlflow`

        run_id = log_run(manifest, finished.history, finished.description, run.folder, files)
        say(f"MLflow: run {run_id} at {uri}")
    except Exception as error:  # from the network to a missing client of the server's storage
        say(f"--mlflow {uri}: {one_line(error)}; the run is complete, and --resume logs it again")
