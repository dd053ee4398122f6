"""Publication: write the table of files, the pictures and the manifest, and show the staged files."""

from typing import Any

import pyarrow as pa

from mnistsum_ray.reporting.report import scored_page
from mnistsum_ray.scoring.layout import FILES_TABLE, MANIFEST, PROBABILITIES, REJECTS, RELIABILITY, REPORT
from mnistsum_ray.scoring.staging import publish_staged
from mnistsum_ray.scoring.target import Target
from mnistsum_ray.scoring.totals import Totals
from mnistsum_ray.scoring.writer import to_parquet
from mnistsum_ray.storage.location import Location


def publish_output(target: Target, files: pa.Table, totals: Totals, manifest: dict[str, Any], published: pa.Table) -> None:
    """Write `files` (`reconcile.FILES_SCHEMA`), the pictures and the manifest; publish staged parts.

    `--overwrite` replaces the files in `published` (`provenance.COMMITTED_SCHEMA`), which the output held when the run began.

    Raises:
        RunError: another run holds the output.
    """
    target.lock.check()
    (target.folder / FILES_TABLE).write_bytes(to_parquet(files))
    pictures = _draw_pictures(totals, target.folder)
    (target.folder / REPORT).write_bytes(scored_page(manifest, totals, pictures).encode())
    (target.folder / MANIFEST).write_json(manifest)
    if target.staged:
        replaced = set(published["output"].to_pylist()) if target.overwrite else ()
        publish_staged(target.folder, target.output, target.lock.fence.check, replace=target.overwrite, replaced=replaced)


def _draw_pictures(totals: Totals, folder: Location) -> dict[str, bytes]:
    """Draw the probabilities; where rows have labels their reliability; where rows were rejected the reasons.

    Returns:
        PNG bytes by title.
    """
    from mnistsum_ray.reporting import pictures  # Matplotlib takes a second to import.

    labelled = totals.counts.get("labelled")
    drawn = {
        ("Rows by predicted probability", PROBABILITIES): pictures.draw_probabilities(**totals.probabilities),
        ("Accuracy by predicted probability", RELIABILITY): pictures.draw_reliability(totals.reliability) if labelled else None,
        ("Rejected rows by reason", REJECTS): pictures.draw_rejects(totals.reasons) if totals.reasons else None,
    }
    for (_, name), png in drawn.items():
        if png:
            (folder / name).write_bytes(png)
        else:
            (folder / name).delete()  # an earlier run may have drawn it
    return {title: png for (title, _), png in drawn.items() if png}
