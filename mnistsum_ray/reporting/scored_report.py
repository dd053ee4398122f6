"""The page report.html of a scored output. `manifest` is the content of its manifest.json."""

from collections.abc import Sequence
from typing import Any

from mnistsum_ray.errors import counted
from mnistsum_ray.reporting.report import metric_cards, reasons_table, render, settings_table
from mnistsum_ray.task import Table


def scored_page(manifest: dict[str, Any], tables: Sequence[Table]) -> str:
    """Render the HTML page of a scored output, with the tables of its task."""
    totals = manifest["totals"]
    labelled_rows = counted(manifest["counts"].get("labelled_rows", 0), "labelled row")
    cards = [
        (f"{totals['rejected_rows']:,}", "rows rejected"),
        (f"{totals['failed_files']:,}", f"files not usable, with {totals['failed_rows']:,} rows"),
        *metric_cards(manifest["metrics"], f", of {labelled_rows}"),
        (f"{totals['rows_per_second']:,.0f}", "rows per second"),
    ]
    failures = list(manifest["failures"].items())
    if len(failures) < totals["failed_files"]:
        failures.append((f"all {totals['failed_files']:,}", "are in files.parquet"))
    return render(
        {},
        title=f"{totals['scored_rows']:,} of {totals['input_rows']:,} rows scored",
        lines=[f"{totals['output']}, from {counted(totals['files'], 'file')}", manifest["notice"]],
        cards=cards,
        tables=[
            ("Files that cannot be used", ("file", "reason"), failures),
            reasons_table("Rejected rows", manifest["bad_rows"]),
            *tables,
            settings_table(manifest, manifest["model"]),
        ],
    )
