"""Publication: write the table of files, the pictures, the report and the manifest, and show the staged files."""

from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.reporting.report import scored_page, versions
from mnistsum_ray.scoring.output import (
    FILES_TABLE,
    MANIFEST,
    PROBABILITIES,
    REJECTS,
    RELIABILITY,
    REPORT,
    Target,
    publish_staged,
)
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.summary import probability_metrics
from mnistsum_ray.scoring.totals import Totals
from mnistsum_ray.storage.location import Location

FORMAT: Final = "mnistsum_ray.score/1"


def make_manifest(run: ScoringRun, precision: str, line: dict[str, Any], totals: Totals, unplanned: int) -> dict[str, Any]:
    """Return the contents of `manifest.json`; `line` is the job's last line, `unplanned` is `CommittedParts.unplanned`."""
    # `at` removes the query of a URI, which may hold keys.
    places = {"model": run.model, "input": run.inputs.root, "output": run.output}
    located = {name: place.at(place.path).display for name, place in places.items()}
    return {
        "format": FORMAT,
        "status": "finished",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": line,
        "consistent_rows": totals.counts.get("consistent", 0),
        "labelled_rows": totals.counts.get("labelled"),
        "rejected_by_reason": totals.reasons,
        "rows_by_probability": totals.probabilities,
        "rows_by_digit": totals.digits,
        "rows_by_number": totals.numbers,
        "probabilities": probability_metrics(totals),
        "config": run.config.model_dump(mode="json", exclude={"config"}) | located,
        "model": {key: run.card[key] for key in ("sha256", "epoch", "parameters")},
        "precision": precision,
        "int8": run.card["int8"] if precision == "int8" else None,
        "skipped_files": len(run.inputs.skipped),
        "files_of_earlier_input": unplanned,
        "versions": versions(),
    }


def publish_output(target: Target, files: pa.Table, totals: Totals, manifest: dict[str, Any], published: pa.Table) -> None:
    """Write `files` (`reconcile.FILES_SCHEMA`), the pictures, the report and the manifest; publish staged parts.

    `--overwrite` replaces the files in `published` (`stamp.COMMITTED_SCHEMA`), which the output held when the run began.

    Raises:
        RunError: another run holds the output.
    """
    target.lock.check()
    (target.folder / FILES_TABLE).write_bytes(to_parquet(files))
    pictures = _draw_pictures(totals, target.folder)
    (target.folder / REPORT).write_bytes(scored_page(manifest, totals, pictures).encode())
    (target.folder / MANIFEST).write_json(manifest)
    if target.staged:
        publish_staged(target, published["output"].to_pylist() if target.overwrite else ())


def _draw_pictures(totals: Totals, folder: Location) -> dict[str, bytes]:
    """Draw the probabilities; where rows have labels their reliability; where rows were rejected the reasons.

    Returns:
        PNG bytes by title.
    """
    from mnistsum_ray.reporting import pictures  # Matplotlib takes a second to import.

    labelled = totals.counts.get("labelled")
    drawn = {
        ("Rows by predicted probability", PROBABILITIES): pictures.draw_probabilities(totals.probabilities),
        ("Accuracy by predicted probability", RELIABILITY): pictures.draw_reliability(totals.reliability) if labelled else None,
        ("Rejected rows by reason", REJECTS): pictures.draw_rejects(totals.reasons) if totals.reasons else None,
    }
    for (_, name), png in drawn.items():
        if png:
            (folder / name).write_bytes(png)
        else:
            (folder / name).delete()  # an earlier run may have drawn it
    return {title: png for (title, _), png in drawn.items() if png}
