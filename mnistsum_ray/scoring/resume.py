"""Resume: find the parts that an earlier run has committed, and delete what it left unfinished."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.checks import check_compatible, check_output_files, check_overwrite
from mnistsum_ray.scoring.layout import PREDICTIONS
from mnistsum_ray.scoring.output_folder import clear_unfinished, delete_part, list_output, read_all_committed
from mnistsum_ray.scoring.plan import ScoringPlan
from mnistsum_ray.scoring.provenance import has_provenance
from mnistsum_ray.scoring.reconcile import match_outputs
from mnistsum_ray.scoring.target import Target
from mnistsum_ray.storage.location import Location


@dataclass(frozen=True)
class CommittedParts:
    """What earlier runs have committed."""

    published: pa.Table
    """`provenance.COMMITTED_SCHEMA` of the output folder when this run began."""
    done: pa.Table
    """`parts.PART_SCHEMA`: parts of the plan that are committed."""
    todo: pa.Table
    """`parts.PART_SCHEMA`: the other parts of the plan."""
    unplanned: int
    """Number of published files whose input is not in the plan. They stay, but are not counted."""

    def done_rows(self, parts: pa.Table) -> int:
        """Rows of those of `parts` (`parts.PART_SCHEMA`) that are done."""
        return pc.sum(self.done.filter(pc.is_in(self.done["output"], parts["output"]))["rows"]).as_py() or 0


def resume(plan: ScoringPlan, spec_json: str, source: Location, target: Target, console: Console) -> CommittedParts:
    """Compare the plan with the files in the output folder and the staging folder, and delete unfinished files there.

    `spec_json` is `PredictionSpec.canonical_json` of this run, and `source` the input's root.

    Raises:
        RequestError: the output folder holds other files, or predictions that this run must not be mixed with.
        RunError: with `--overwrite`, an unusable input file has predictions in the output.
    """
    output = target.output
    listing = list_output(output)
    published = read_all_committed(output, listing.predictions, console.progress)
    check_output_files(published, listing, output)
    unplanned = 0
    if target.overwrite:
        check_overwrite(plan.files, published, source)
    else:
        others = unplanned_outputs(plan.parts, published)
        check_compatible(match_outputs(plan.parts, published, spec_json), others, plan.files, source, spec_json, output)
        unplanned = others.num_rows
        if unplanned:
            first = others["source"][0].as_py()
            console.say(f"left as they are: {unplanned:,} output files of input that is not there now, such as {first}")
    # Nothing is deleted before all files are known as this program's and the request has been found compatible.
    clear_unfinished(output, listing)
    committed = published
    if target.staged:
        committed = target.merge(_resume_staging(target.folder, plan.parts, spec_json, console), published)
    matched = match_outputs(plan.parts, committed, spec_json)
    done, todo = (matched.filter(keep).select(plan.parts.column_names) for keep in (matched["done"], pc.invert(matched["done"])))
    return CommittedParts(published, done, todo, unplanned)


def unplanned_outputs(parts: pa.Table, committed: pa.Table) -> pa.Table:
    """Return the rows of `committed` that belong to no part of the plan."""
    return committed.filter(pc.invert(pc.is_in(committed["output"], parts["output"])))


def _resume_staging(folder: Location, parts: pa.Table, spec_json: str, console: Console) -> pa.Table:
    """Delete all files in the staging folder but the committed parts of this plan; return those."""
    listing = list_output(folder)
    committed = read_all_committed(folder, listing.predictions, console.progress)
    # Parts with errors are left by a run that was killed while it published, or are of another version.
    broken = committed.filter(pc.is_valid(committed["error"]))["output"].to_pylist()
    broken = [name for name in broken if has_provenance(folder, f"{PREDICTIONS}/{name}")]
    for name in broken:
        delete_part(folder, name)
    if broken:
        listing = list_output(folder)
        committed = read_all_committed(folder, listing.predictions, console.progress)
    check_output_files(committed, listing, folder)
    clear_unfinished(folder, listing)
    # Staged files are not published yet, so those of another plan can be deleted.
    matched = match_outputs(parts, committed, spec_json)
    current = pc.is_in(committed["output"], matched.filter(matched["done"])["output"])
    for name in committed.filter(pc.invert(current))["output"].to_pylist():
        delete_part(folder, name)
    return committed.filter(current)
