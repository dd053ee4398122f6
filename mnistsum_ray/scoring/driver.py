"""A scoring run, seen from the driver: plan, score what is not done, reconcile, publish."""

import time
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.exceptions
import torch

from mnistsum_ray.cluster.gpu import check_cuda, probe_gpu, usable_cluster
from mnistsum_ray.cluster.resources import describe_wait, inspect_cluster, wait_until_free
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, last_line
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.model.quantization import maxima_from_card
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.progress import PROGRESS_INTERVAL_SECONDS, Progress
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.scoring import summary
from mnistsum_ray.scoring.crash_counter import start_crash_counter
from mnistsum_ray.scoring.layout import FILES_TABLE, MANIFEST, REJECTED
from mnistsum_ray.scoring.output_folder import OutputListing, clear_unfinished, delete_part, list_output, unpublish
from mnistsum_ray.scoring.parallel import map_files
from mnistsum_ray.scoring.pipeline import WorkerContext, stream_reports
from mnistsum_ray.scoring.plan import plan_parts, units_of
from mnistsum_ray.scoring.preflight import ScoringRun, read_all_footers
from mnistsum_ray.scoring.provenance import COMMITTED_SCHEMA, PredictionSpec, is_ours, read_committed
from mnistsum_ray.scoring.reconcile import Totals, match_outputs, reconcile
from mnistsum_ray.scoring.resources import ScoringResourcePlan, plan_scoring_resources
from mnistsum_ray.scoring.resume import check_compatible, check_output_files, unplanned_outputs
from mnistsum_ray.scoring.staging import publish_output, staging_folder
from mnistsum_ray.scoring.writer import to_parquet
from mnistsum_ray.storage.listing import report_skipped
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import OutputLock, output_lock

FORMAT: Final = "mnistsum_ray.score/1"


def score(run: ScoringRun, console: Console) -> dict[str, Any]:
    """Score on the cluster that this process is connected to.

    Returns:
        The fields of the job's last line (see the README).

    Raises:
        RequestError: the cluster cannot carry it, or the output holds something else.
        RunError: the output cannot be written, rows are missing at the end, or with `--strict` some input cannot be used.
        RunInterrupted: it was interrupted.
    """
    try:
        return _score(run, console)
    except KeyboardInterrupt:
        raise RunInterrupted("what is committed stays, and the same command goes on") from None
    except (OSError, ray.exceptions.RayError) as error:  # what is wrong with one file of the input is caught where it is read
        console.say_lines(str(error))
        raise RunError(f"{last_line(error)}; what is committed stays, and the same command goes on") from error


def _score(run: ScoringRun, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    config = run.config
    wanted = False if config.precision == "int8" else config.use_gpu
    cluster, probe = usable_cluster(inspect_cluster(), wanted, config.wait_seconds, console.say)
    resource_plan = plan_scoring_resources(config, cluster)
    wait_until_free(resource_plan.bundles(), config.wait_seconds, console.say)
    if resource_plan.use_gpu and probe is None:  # the GPUs have come while it waited
        probe = probe_gpu(config.wait_seconds)
        check_cuda(probe, config.use_gpu)
    first = run.inputs.root / run.inputs.files["name"][0].as_py()
    check_shared_storage({"--output": run.output}, {"--input": first}, console.say)
    # On CPUs what is faster on this one, which is taken to be like those that score.
    bf16 = probe.bf16 if probe else faster_with_bf16(torch.device("cpu"))
    precision = config.precision or ("bf16" if bf16 else "fp32")
    maxima = maxima_from_card(run.card) if precision == "int8" else None
    request = PredictionSpec(run.card["sha256"], precision, run.columns, run.temperatures, maxima)
    with output_lock(run.output, "--output", console.say) as held:
        # Not before: what is wrong with a request is to be found out soon.
        run = replace(run, output=run.output.with_retries(), inputs=replace(run.inputs, root=run.inputs.root.with_retries()))
        return _Scoring(run, console, resource_plan, request, held, started).run()


class _Scoring:
    """One run while it holds its output folder."""

    def __init__(
        self,
        run: ScoringRun,
        console: Console,
        resource_plan: ScoringResourcePlan,
        request: PredictionSpec,
        held: OutputLock,
        started: float,
    ) -> None:
        self._run, self._console, self._resource_plan = run, console, resource_plan
        self._request, self._held, self._started = request, held, started
        config = run.config
        self._staged = config.overwrite or config.strict
        self._folder = staging_folder(run.output) if self._staged else run.output
        self._source = run.inputs.root
        self._fitting = inspect_cluster().places(resource_plan.per_actor)
        self._published = pa.Table.from_pylist([], COMMITTED_SCHEMA)

    def run(self) -> dict[str, Any]:
        config, say = self._run.config, self._console.say
        files, parts = self._plan()
        matched, left = self._done(files, parts)
        todo = matched.filter(pc.invert(matched["done"])).select(parts.column_names)
        done = matched.filter(matched["done"])
        resumed_rows = pc.sum(done["rows"]).as_py() or 0
        todo_rows = pc.sum(todo["rows"]).as_py() or 0
        kind, number = "GPU" if self._resource_plan.use_gpu else "CPU", self._resource_plan.actors
        say(
            f"{todo_rows:,} rows to score"
            + (f", {resumed_rows:,} done by an earlier run" if resumed_rows else "")
            + f"; {files.num_rows:,} files below {self._source.display}"
            + f"; {'up to ' * (self._fitting < number)}{number} {kind} workers, {self._request.precision}"
        )
        if todo.num_rows and not self._staged:
            unpublish(self._run.output)
        failures, seconds = self._stream(todo, todo_rows)
        if failures:
            files = _with_errors(files, failures)
            summary.name_failures(failures, say)
            failed = pc.is_in(parts["name"], pa.array(failures, pa.string()))
            for name in parts.filter(failed)["output"].to_pylist():
                self._held.fence.check()
                delete_part(self._folder, name)
            parts = parts.filter(pc.invert(failed))
            resumed_rows = pc.sum(done.filter(pc.is_in(done["output"], parts["output"]))["rows"]).as_py() or 0
        table, totals = reconcile(files, match_outputs(parts, self._committed(), self._request.canonical_json()))
        failed_files = pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
        self._refuse_to_lose(files)
        if config.strict and (failed_files or totals.rejected_rows):
            raise RunError(self._strictly(totals, failed_files))
        done_now = totals.scored_rows + totals.rejected_rows - resumed_rows
        line: dict[str, Any] = {
            "output": self._run.output.display,
            "input_rows": totals.input_rows,
            "scored_rows": totals.scored_rows,
            "rejected_rows": totals.rejected_rows,
            "resumed_rows": resumed_rows,
            "files": files.num_rows,
            "failed_files": failed_files,
            "rows_per_second": round(done_now / seconds, 1) if seconds else 0.0,
            "seconds": round(time.monotonic() - self._started, 1),
        }
        if self._run.columns.label:
            labelled = totals.counts.get("labelled", 0)
            for name, right in (("digit_accuracy", "digits_right"), ("sum_accuracy", "sums_right")):
                line[name] = totals.counts[right] / labelled if labelled else None
        self._held.check()
        (self._folder / FILES_TABLE).write_bytes(to_parquet(table))
        summary.draw(totals, self._folder)
        (self._folder / MANIFEST).write_json(self._manifest(line, totals, left))
        if self._staged:
            ours = set(self._published["output"].to_pylist()) if config.overwrite else ()
            publish_output(self._folder, self._run.output, self._held.fence.check, replace=config.overwrite, ours=ours)
        summary.summarize(line, totals, say)
        return line

    def _plan(self) -> tuple[pa.Table, pa.Table]:
        """The files with what their footers say, and the parts."""
        run = self._run
        footers = (
            run.footers
            if run.footers is not None
            else read_all_footers(run.inputs, run.columns, self._progress("footers read", run.inputs.files.num_rows))
        )
        files = run.inputs.files
        for name in footers.column_names:
            files = files.append_column(name, footers[name])
        parts, clashes = plan_parts(files, run.config.max_rows_per_file)
        files = _with_errors(files, clashes | run.inputs.unusable)
        report_skipped(run.inputs.skipped, self._console.say)
        failures = files.filter(pc.is_valid(files["error"])).select(["name", "error"]).to_pylist()
        summary.name_failures({row["name"]: row["error"] for row in failures}, self._console.say)
        if failures and run.config.strict:
            raise RunError(f"--strict: nothing was scored: {len(failures):,} files cannot be used, see above")
        return files, parts

    def _done(self, files: pa.Table, parts: pa.Table) -> tuple[pa.Table, int]:
        """What is committed of each part, and how many files are left from input that is no longer there."""
        run, request, output = self._run, self._request.canonical_json(), self._run.output
        listing = list_output(output)
        published = self._own_records(output, listing)
        left = 0
        self._published = published
        if run.config.overwrite:
            self._refuse_to_lose(files)
        else:
            strange = unplanned_outputs(parts, published)
            check_compatible(match_outputs(parts, published, request), strange, files, self._source, request, output)
            left = strange.num_rows
            if left:
                first = strange["source"][0].as_py()
                self._console.say(f"left as they are: {left:,} output files of input that is not there now, such as {first}")
        # Not before everything has been found to be ours, and the request to go with it.
        clear_unfinished(output, listing)
        if not self._staged:
            return match_outputs(parts, published, request), left
        listing = list_output(self._folder)
        if self._drop_broken(listing):
            listing = list_output(self._folder)
        staged = self._own_records(self._folder, listing)
        clear_unfinished(self._folder, listing)
        matched = match_outputs(parts, staged, request)
        # Nobody has seen it yet, so what is not of this plan is thrown away.
        stale = pc.invert(pc.is_in(staged["output"], matched.filter(matched["done"])["output"]))
        for name in staged.filter(stale)["output"].to_pylist():
            delete_part(self._folder, name)
        return match_outputs(parts, self._counting(staged.filter(pc.invert(stale)), published), request), left

    def _drop_broken(self, listing: OutputListing) -> bool:
        """Delete staged parts of ours that are not whole, or of another version: those of a run killed while it published."""
        records = self._records(self._folder, listing.predictions)
        broken = records.filter(pc.is_valid(records["error"]))["output"].to_pylist()
        ours = [name for name in broken if is_ours(self._folder, name)]
        for name in ours:
            delete_part(self._folder, name)
        return bool(ours)

    def _own_records(self, folder: Location, listing: OutputListing) -> pa.Table:
        """What is committed in a folder.

        Raises:
            RequestError: the folder holds something that is not of this program.
        """
        committed = self._records(folder, listing.predictions)
        check_output_files(committed, folder)
        known = set(committed.filter(pc.greater(committed["rejected"], 0))["output"].to_pylist())
        strange = next((name for name in sorted(listing.rejected - known) if not is_ours(folder, f"{REJECTED}/{name}")), None)
        if strange is not None:
            raise RequestError(
                f"--output {folder.display}: {REJECTED}/{strange} is not a file of this program; move it away, or choose another "
                "folder"
            )
        return committed

    def _refuse_to_lose(self, files: pa.Table) -> None:
        """With `--overwrite`, a file that cannot be used just now must not cost the predictions that are there of it."""
        failed = files.filter(pc.is_valid(files["error"]))
        # As in `check_compatible`: the input may have moved, or its root may be another folder now.
        sources = pc.binary_join_element_wise(self._source.at(self._source.path).display, failed["name"], "/")
        published = self._published
        lost = failed.filter(pc.or_(pc.is_in(failed["name"], published["name"]), pc.is_in(sources, published["source"])))
        if self._run.config.overwrite and lost.num_rows:
            raise RunError(
                f"--overwrite: nothing was replaced: {lost['name'][0]} cannot be used, and the output holds its predictions; "
                "mend it, or take it out of the input"
            )

    def _counting(self, staged: pa.Table, published: pa.Table) -> pa.Table:
        """Of what is staged and published, that which the finished output will hold."""
        if self._run.config.overwrite:
            return staged
        return pa.concat_tables([staged, published.filter(pc.invert(pc.is_in(published["output"], staged["output"])))])

    def _committed(self) -> pa.Table:
        """What is committed and counts, read from the files."""
        published = self._read(self._run.output)
        return self._counting(self._read(self._folder), published) if self._staged else published

    def _read(self, folder: Location) -> pa.Table:
        return self._records(folder, list_output(folder).predictions)

    def _records(self, folder: Location, files: pa.Table) -> pa.Table:
        return map_files(read_committed, folder, files, self._progress("output files read", files.num_rows))

    def _progress(self, what: str, total: int) -> Progress:
        return Progress(self._console.progress, what, total)

    def _stream(self, todo: pa.Table, todo_rows: int) -> tuple[dict[str, str], float]:
        """Score; the files that could not be read after all with the reason, and the seconds from first start to last end."""
        failures: dict[str, str] = {}
        if not todo.num_rows:
            return failures, 0.0
        run = self._run
        work = WorkerContext(
            source=self._source,
            output=self._folder,
            request=self._request,
            weights=ray.put(run.weights),
            batch_size=run.config.batch_size,
            attempts=start_crash_counter(),
            fence=self._held.fence,
            conditional=self._held.conditional,
        )
        units = units_of(todo, run.config.max_rows_per_file, max(self._resource_plan.actors, self._resource_plan.readers))
        done, first, last, said = 0, float("inf"), 0.0, time.monotonic()
        with self._console.breaking_silence(describe_wait) as heard:
            for report in stream_reports(units, work, self._resource_plan, self._fitting):
                heard()
                self._held.check()
                unwritable = report["unwritable"].drop_null()
                if len(unwritable):
                    raise RunError(
                        f"--output {run.output.display}: cannot be written: {unwritable[0].as_py()}; what is committed stays"
                    )
                for row in report.filter(pc.is_valid(report["unreadable"])).to_pylist():
                    failures.setdefault(row["name"], row["unreadable"])
                done += pc.sum(report["rows"]).as_py()
                first = min(first, pc.min(report["started"]).as_py())
                last = max(last, pc.max(report["ended"]).as_py())
                if time.monotonic() - said >= PROGRESS_INTERVAL_SECONDS:
                    said = time.monotonic()
                    rate = done / max(last - first, 1e-9)
                    left = f"{(todo_rows - done) / rate:,.0f} s left" if rate else ""
                    self._console.progress(f"{done:,} of {todo_rows:,} rows  {rate:,.0f} rows/s  {left}")
        return failures, last - first

    def _manifest(self, line: dict[str, Any], totals: Totals, left: int) -> dict[str, Any]:
        run = self._run
        # As located, without what a URI says beside scheme and path.
        places = {"model": run.model, "input": self._source, "output": run.output}
        located = {name: place.at(place.path).display for name, place in places.items()}
        return {
            "format": FORMAT,
            "status": "finished",
            "totals": line,
            "consistent_rows": totals.counts.get("consistent", 0),
            "labelled_rows": totals.counts.get("labelled"),
            "rejected_by_reason": totals.reasons,
            "rows_by_probability": totals.probabilities,
            "probabilities": summary.probability_metrics(totals),
            "config": run.config.model_dump(mode="json", exclude={"config"}) | located,
            "model": {key: run.card[key] for key in ("sha256", "epoch", "parameters", "temperature")},
            "precision": self._request.precision,
            "int8": run.card["int8"] if self._request.precision == "int8" else None,
            "skipped_files": len(run.inputs.skipped),
            "files_of_earlier_input": left,
            "versions": versions(),
        }

    def _strictly(self, totals: Totals, failed_files: int) -> str:
        text = f"--strict: nothing was published: {totals.rejected_rows:,} rows and {failed_files:,} files cannot be used"
        if not totals.rejected_rows:
            return text
        name = min(list_output(self._folder).rejected or list_output(self._run.output).rejected)
        holder = self._folder if (self._folder / REJECTED / name).exists() else self._run.output
        with holder.filesystem.open_input_file((holder / REJECTED / name).path) as stream_:
            row = pq.read_table(stream_, columns=["source_file", "source_row", "reason"]).slice(0, 1).to_pylist()[0]
        return (
            f"{text}; first: {row['source_file']}, row {row['source_row']}: {row['reason']}; all: {(holder / REJECTED).display}"
        )


def _with_errors(files: pa.Table, errors: dict[str, str]) -> pa.Table:
    if not errors:
        return files
    reasons = [errors.get(name, old) for name, old in zip(files["name"].to_pylist(), files["error"].to_pylist(), strict=True)]
    return files.set_column(files.column_names.index("error"), "error", pa.array(reasons, pa.string()))
