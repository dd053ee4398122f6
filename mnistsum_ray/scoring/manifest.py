"""The manifest of an output: totals, settings, model and versions. While it exists, the output is finished."""

from datetime import UTC, datetime
from typing import Any, Final

from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.summary import probability_metrics
from mnistsum_ray.scoring.totals import Totals

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
        "model": {key: run.card[key] for key in ("sha256", "epoch", "parameters", "temperature")},
        "precision": precision,
        "int8": run.card["int8"] if precision == "int8" else None,
        "skipped_files": len(run.inputs.skipped),
        "files_of_earlier_input": unplanned,
        "versions": versions(),
    }
