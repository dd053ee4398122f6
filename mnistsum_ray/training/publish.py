"""End of a training run: publish the model, write the report, complete the manifest."""

import time
from typing import TYPE_CHECKING, Any, Final

from mnistsum_ray.cluster.signals import defer_signals
from mnistsum_ray.model.network import PARAMETERS
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.artifacts import publish_model, write_data_files, write_history, write_report
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.preflight import TrainingRun

if TYPE_CHECKING:
    from mnistsum_ray.reporting.mlflow import MLflowRun

_TEST_FIELDS: Final = ("rows", "pairs", "loss", "digit_accuracy", "sum_accuracy")


def publish_run(
    run: TrainingRun,
    manifest: dict[str, Any],
    result: TrainingResult,
    lock: FolderLock,
    mlflow: "MLflowRun | None",
    started: float,
    console: Console,
) -> dict[str, Any]:
    """Publish a finished run.

    Args:
        run: config and folders.
        manifest: of the running run; completed in place.
        result: of the training.
        lock: checked before each write.
        mlflow: gets the model's metrics and the files.
        started: `time.monotonic()` at the start of the run.
        console: shows where the model and the report are.

    Returns:
        The fields of the job's JSON line.
    """
    lock.check()
    if run.source.files and result.checksums is not None:
        write_data_files(run.folder, run.source.files, result.checksums)
        manifest["data"]["sha256"] = run.source.content_sha256(result.checksums)
    card = publish_model(run.folder, result)
    write_history(run.folder, result.history)
    summary = {
        "run": run.folder.display,
        "model": (run.folder / "model").display,
        "parameters": PARAMETERS,
        "data": {key: manifest["data"][key] for key in ("source", "train_rows", "validation_rows", "test_rows")},
        "test": {key: card["test"][key] for key in _TEST_FIELDS},
        "images_per_second": round(_steady_rate(result.history), 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    manifest |= {
        "status": "finished",
        "metrics": summary,
        "hardware": result.hardware,
        "precision": result.precision,
        "error_analysis": result.error_analysis.as_json(),
    }
    lock.check()
    files = write_report(run, manifest, card, result)
    lock.check()
    manifest_file = run.folder / "manifest.json"
    with defer_signals():  # a run that is finished is not stopped
        manifest_file.write_json(manifest)
    if mlflow:
        logged = mlflow.finish(result.history, card, run.folder, files, console.say)
        summary["mlflow"] = mlflow.run_id if logged else None
        manifest_file.write_json(manifest)
    console.say(f"model: {summary['model']}")
    console.say(f"report: {(run.folder / REPORT).display}")
    return summary


def _steady_rate(history: list[dict[str, Any]]) -> float:
    """Training rows per second without the first epoch, which includes one-time work such as loading kernels."""
    steady = history[1:] or history
    return float(sum(line["rows_per_second"] * line["seconds"] for line in steady) / sum(line["seconds"] for line in steady))
