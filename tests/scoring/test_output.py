"""The output folder: what is in it, what is refused, and what a later command makes of it."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from mnistsum_ray.data import parquet
from mnistsum_ray.data.parquet import read_ranges
from mnistsum_ray.errors import RequestError, RunError, TryAgainError, percent
from mnistsum_ray.scoring import actor
from mnistsum_ray.scoring.parts import PART_KEY
from mnistsum_ray.scoring.record import RUN_FORMAT
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.conftest import write_model
from tests.scoring.conftest import CONSOLE, TIMED, Example, score_without_ray, write_rows
from tests.storage.conftest import serve_s3

ADDED = {"pred_digit": "int8", "digit_prob": "float", "pred_sum": "int8", "sum_prob": "float"}
# Of nulls in lists of a fixed size, Arrow's reader fails.
ADDED |= {"consistent": "bool", "digit_probs": "list<element: float>"}
ADDED |= {"sum_probs": "list<element: float>", "reason": "string"}
OF_A = [f"predictions/a-0000{part}-of-00003.parquet" for part in range(3)]
BROKEN = "is not Parquet, or was cut off; write it again"
PARTS = {*OF_A, "predictions/deep/b.pq", "predictions/none.parquet"}
ABOUT = {"run.json", "files.parquet"}


def manifest_of(example: Example) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((example.output / "manifest.json").read_text())
    return value


def listed(example: Example) -> list[list[Any]]:
    """The rows of files.parquet."""
    rows = pq.read_table(example.output / "files.parquet").to_pylist()
    return [[*row.values()] for row in rows]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that runs say."""
    said: list[str] = []
    monkeypatch.setattr(CONSOLE, "say", said.append)
    return said


def test_each_input_row_is_one_output_row_in_its_order(example: Example) -> None:
    assert example.score(probabilities=True).scored_rows == 11
    assert example.files(*TIMED).keys() == PARTS | ABOUT
    outputs = {name: pq.ParquetFile(example.output / name).read() for name in PARTS}
    outputs["predictions/a.parquet"] = pa.concat_tables([outputs[name] for name in OF_A])
    for name in ("a.parquet", "deep/b.pq", "none.parquet"):
        given, found = pq.ParquetFile(example.input / name).read(), outputs[f"predictions/{name}"]
        names = [column for column in given.column_names if column != "image"]
        assert found.column_names == [*names, *ADDED]
        assert [str(type_) for type_ in found.schema.types[len(names) :]] == [*ADDED.values()]
        assert found.select(names).to_pylist() == given.select(names).to_pylist()
        plain = [name for name in names if name != "view"]
        assert found.select(plain).schema.types == given.select(plain).schema.types
        assert found.schema.metadata.keys() <= {PART_KEY, b"ARROW:schema"}, "none of the input"


def test_each_input_file_is_listed_with_its_rows(example: Example, lines: list[str]) -> None:
    example.score()
    assert listed(example) == [
        ["a.parquet", 10, 8, 2, 0, "scored", None],
        ["broken.parquet", None, 0, 0, None, "failed", BROKEN],
        ["deep/b.pq", 3, 3, 0, 0, "scored", None],
        ["none.parquet", 0, 0, 0, 0, "scored", None],
    ]
    assert f"rejected: broken.parquet: {BROKEN}" in lines


def test_labels_none_of_which_can_be_used_are_said_to_be_none(
    example: Example, lines: list[str]
) -> None:
    """They are texts such as `b`: no row is rejected for them."""
    line = example.score(input=str(example.file), label_column="view").line()
    assert (line["digit_accuracy"], line["sum_accuracy"], line["scored_rows"]) == (None, None, 8)
    assert "metrics: not known (0 labelled rows)" in lines


def test_a_run_that_goes_on_has_the_files_and_counts_of_one_run(example: Example) -> None:
    example.score(label_column="label")
    fresh, files = manifest_of(example), example.files(*TIMED)
    for name in (OF_A[0], "predictions/deep/b.pq"):
        (example.output / name).unlink()
    assert example.score(label_column="label").resumed_rows == 6
    assert example.files(*TIMED) == files
    resumed = manifest_of(example)
    assert resumed == fresh | {name: resumed[name] for name in ("totals", "finished")}
    for name in ("digit_accuracy", "sum_accuracy", "scored_rows"):
        assert resumed["totals"][name] == fresh["totals"][name]


def test_counts_are_those_of_the_rows_and_the_report_shows_them(example: Example) -> None:
    example.score(label_column="label")
    manifest = manifest_of(example)
    counts, totals = manifest["counts"], manifest["totals"]
    rows = duckdb.read_parquet(f"{example.output}/predictions/**/*.p*q*", union_by_name=True).df()
    good = rows[rows["reason"].isna()]
    labelled = good[good["label"].between(0, 9)]
    digits, right = good["pred_digit"].astype(int), labelled["label"] == labelled["pred_digit"]
    assert manifest["bad_rows"]["reasons"] == rows["reason"].value_counts().to_dict()
    assert (counts["rows"], counts["labelled_rows"]) == (len(rows), len(labelled))
    assert counts["predicted_digits"] == np.bincount(digits, minlength=10).tolist()
    right_sums = labelled["label"] + labelled["number"] == labelled["pred_sum"]
    assert (totals["digit_accuracy"], totals["sum_accuracy"]) == (right.mean(), right_sums.mean())
    page = (example.output / "report.html").read_text()
    assert f"digit correct, of {len(labelled)} labelled rows" in page
    by_number = []
    for number, consistent in good.groupby("number")["consistent"]:
        by_number.append((int(number), len(consistent), percent(consistent.mean())))
    of_digits = enumerate(counts["predicted_digits"])
    for row in [("broken.parquet", BROKEN), *of_digits, *by_number]:
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page


def test_a_file_that_readers_of_the_output_would_skip_is_rejected(example: Example) -> None:
    write_rows(example.input / "_hidden.parquet", [1])
    example.score(input=[str(example.input / name) for name in ("a.parquet", "_hidden.parquet")])
    assert listed(example)[0][6] == "has a name that readers of Parquet skip; rename it"


def write(name: str, data: bytes = b"of another program") -> Any:
    def change(example: Example) -> None:
        (example.output / name).write_bytes(data)

    return change


def copy(source: str, name: str) -> Any:
    def change(example: Example) -> None:
        shutil.copy(example.folder / source, example.output / name)

    return change


def lose_rows(example: Example) -> None:
    """A part that has fewer rows than it says itself."""
    path = example.output / OF_A[1]
    pq.write_table(pq.read_table(path)[1:], path)


def another_run_begins(example: Example) -> None:
    run = example.output / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"id": "another"}))


def lose_id(example: Example) -> None:
    run = example.output / "run.json"
    kept = json.loads(run.read_text())
    del kept["id"]
    run.write_text(json.dumps(kept))


def edit_footer(edit: Any) -> Any:
    """Change what a part says of itself."""

    def change(example: Example) -> None:
        table = pq.read_table(example.output / OF_A[1])
        says = json.loads(table.schema.metadata[PART_KEY])
        edit(says)
        table = table.replace_schema_metadata({PART_KEY: json.dumps(says)})
        pq.write_table(table, example.output / OF_A[1])

    return change


OLD = b'{"format": "mnistsum_ray.score/1", "version": "0.0.1", "request": {}}'
AGAIN = "--overwrite deletes that output and scores everything again"
BEGUN = f"was begun with {{}}, and this run has {{}}; give the same again, or {AGAIN}"
AWAY = "is not a file of this program; move it away, or choose another folder"


def other_model(example: Example) -> dict[str, Any]:
    return {"model": str(write_model(example.folder / "model", 1))}


def given(**settings: Any) -> Any:
    return lambda _: settings


REFUSALS: list[tuple[Any, str]] = [
    (given(max_rows_per_file=None), BEGUN.format("--max-rows-per-file 4", "null")),
    (given(precision="bf16"), BEGUN.format("--precision fp32", "bf16")),
    (other_model, AGAIN),
    (given(label_column="number"), "column 'number' would be two columns of the task; --label-co"),
    (
        lambda example: {"input": str(example.input / "deep")},
        f"/in/deep; give the same again, or {AGAIN}",
    ),
    (write("run.json", OLD), BEGUN.format("format mnistsum_ray.score/1", RUN_FORMAT)),
    (another_run_begins, f"{OF_A[0]} is of another run than run.json; {AGAIN}"),
    (copy("in/deep/b.pq", OF_A[1]), f"{OF_A[1]} {AWAY}"),
    (lose_id, f"run.json has no id; {AGAIN}"),
    (edit_footer(lambda says: says.pop("metrics")), f"{OF_A[1]} {AWAY}"),
    (edit_footer(lambda says: says["counts"].update(rows=1000)), f"{OF_A[1]} {AWAY}"),
    (edit_footer(lambda says: says["counts"].update(rejected_rows=3)), f"{OF_A[1]} {AWAY}"),
    (lambda example: (example.output / "run.json").unlink(), f"files.parquet {AWAY}"),
    (write("run.json"), f"run.json {AWAY}"),
    (write("run.json", b'{"format": "of another", "run": 1}'), f"run.json {AWAY}"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_what_is_refused_changes_nothing(example: Example, change: Any, message: str) -> None:
    """Where it is offered, --overwrite then gives what an empty folder would."""
    example.score()
    others = dict.fromkeys((".notes", "predictions/.DS_Store"), b"of another program")
    for name in others:
        write(name)(example)
    settings = change(example) or {}
    before = example.files(*TIMED)
    for overwrite in (False,) if AGAIN in message else (False, True):
        with pytest.raises(RequestError, match=re.escape(message)):
            example.score(**settings, overwrite=overwrite)
        assert example.files(*TIMED) == before
    if AGAIN in message:
        example.score(**settings, overwrite=True)
        overwritten = example.files(*TIMED)
        shutil.rmtree(example.output)
        example.score(**settings)
        assert overwritten == example.files(*TIMED) | others


def test_overwrite_deletes_nothing_beside_a_file_of_somebody_else(example: Example) -> None:
    example.score()
    (example.output / "notes.txt").touch()
    before = example.files()
    with pytest.raises(RequestError, match=r"notes.txt is not a file of this program; move it"):
        example.score(overwrite=True)
    assert example.files() == before


def test_overwrite_deletes_nothing_where_no_input_can_be_used(example: Example) -> None:
    example.score()
    before = example.files()
    (example.input / "a.parquet").write_bytes(b"not Parquet")
    only = str(example.input / "a.parquet")
    with pytest.raises(RequestError, match=r"can be (used|scored)"):
        example.score(input=only, overwrite=True)
    assert example.files() == before


def test_output_of_input_that_is_gone_stays(example: Example) -> None:
    """Also where a part of it is missing."""
    example.score()
    before = example.files(*TIMED)
    example.file.rename(example.folder / "a.parquet")
    for part, rows in ((None, [10, 8, 2]), (OF_A[2], [8, 6, 2])):
        if part:
            (example.output / part).unlink()
        kept = example.score()
        assert (kept.input_rows, kept.files, kept.resumed_rows) == (3, 3, 3)
        assert listed(example)[0] == ["a.parquet", *rows, 0, "gone", None]
        assert manifest_of(example)["counts"]["rows"] == 3
    (example.folder / "a.parquet").rename(example.file)
    assert example.score().resumed_rows == 11
    assert example.files(*TIMED) == before


def test_a_file_that_has_changed_is_scored_again(example: Example) -> None:
    """One has the same rows, then fewer and other parts; another is no Parquet any more."""
    example.score()
    write_rows(example.file, range(10))
    again = example.score()
    assert (again.scored_rows, again.resumed_rows) == (13, 3)
    assert example.files(*TIMED).keys() == PARTS | ABOUT
    write_rows(example.file, range(20, 23))
    (example.input / "deep" / "b.pq").write_bytes(b"not Parquet")
    again = example.score()
    assert (again.input_rows, again.scored_rows, again.resumed_rows) == (3, 3, 0)
    left = {"predictions/a.parquet", "predictions/none.parquet"}
    assert example.files(*TIMED).keys() == left | ABOUT
    assert pq.read_table(example.output / "predictions/a.parquet")["id"].to_pylist() == [20, 21, 22]


@pytest.mark.parametrize("change", [copy(f"out/{OF_A[0]}", OF_A[1]), lose_rows])
def test_a_part_that_has_not_its_rows_is_scored_again(example: Example, change: Any) -> None:
    example.score()
    before = example.files(*TIMED)
    change(example)
    assert example.score().resumed_rows == 9
    assert example.files(*TIMED) == before


def test_a_line_says_what_has_become_of_the_input(example: Example, lines: list[str]) -> None:
    """None does of a first run, nor where nothing has changed."""
    for _ in range(2):
        example.score()
    assert "of the input" not in " ".join(lines)
    example.file.rename(example.input / "c.parquet")
    write_rows(example.input / "more.parquet", [13])
    write_rows(example.input / "deep" / "b.pq", [14])
    example.score()
    assert [line for line in lines if "of the input" in line] == [
        "2 files of the input: new",
        "1 file of the input: changed, and scored again",
        "1 file of the input: gone; their output stays",
    ]


def test_strict_ends_without_a_manifest(example: Example) -> None:
    example.score()
    with pytest.raises(RunError, match=r"^--strict: 2 rows and 1 file rejected; .* no manif"):
        example.score(strict=True)
    assert not (example.output / "manifest.json").exists()
    assert example.score().resumed_rows == 13


def test_a_file_that_cannot_be_read_costs_itself_alone(example: Example) -> None:
    """The last page of one is damaged; others are replaced while it is scored, by a folder too."""
    data, other = bytearray(example.file.read_bytes()), example.input / "deep" / "b.pq"
    column = pq.read_metadata(example.file).row_group(2).column(1)
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    whole = example.file.rename(example.folder / "a.parquet")
    example.file.write_bytes(data)

    def execute(*given: Any) -> Any:
        other.write_bytes(data)
        folder.unlink()
        folder.mkdir()
        return score_without_ray(*given)

    folder = example.input / "folder.parquet"
    for name in ("folder.parquet", "good.parquet"):
        write_rows(example.input / name, [13])
    example.score(execute)
    good = {"predictions/good.parquet", "predictions/none.parquet"}
    assert example.files(*TIMED).keys() == good | ABOUT
    damaged, _, replaced, of_folder, _, none = listed(example)
    assert damaged[:6] == ["a.parquet", 10, 0, 0, 10, "failed"]
    assert replaced[:6] == ["deep/b.pq", 3, 0, 0, 3, "failed"]
    assert "CRC" in damaged[6]
    for failed in (replaced, of_folder):
        assert "has changed since the run began" in failed[6]
    assert none[5] == "scored"
    whole.replace(example.file)
    assert example.score().scored_rows == 9


def test_an_input_that_is_rewritten_in_place_while_it_is_read_costs_itself_alone(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first part: no part may have rows of both contents."""

    def read_first(*given: Any) -> Any:
        for number, table in enumerate(read_ranges(*given)):
            if number == 1:
                example.file.write_bytes(example.file.read_bytes())
            yield table

    monkeypatch.setattr(actor, "read_ranges", read_first)
    assert example.score().failed_rows == 10
    assert not {*OF_A} & example.files().keys()
    assert listed(example)[0][6] == "has changed since the run began; run the command again"


@pytest.mark.parametrize("rows", [0, 3])
def test_a_run_in_which_nothing_can_be_scored_fails_and_says_why(
    example: Example, rows: int
) -> None:
    """Beside the broken file is one of no rows, or one of rows that are rejected."""
    names = ["broken.parquet", "c.parquet"]
    write_rows(example.input / "c.parquet", range(rows), number=[99] * rows)
    said = f"^nothing was scored: {rows} rows and 1 file rejected; report.html and files"
    with pytest.raises(RunError, match=said):
        example.score(input=[str(example.input / name) for name in names])
    broken = ["broken.parquet", None, 0, 0, None, "failed", BROKEN]
    assert listed(example) == [broken, ["c.parquet", rows, 0, rows, 0, "scored", None]]
    assert BROKEN in (example.output / "report.html").read_text()
    assert not (example.output / "manifest.json").exists()


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_column_of_a_type_that_is_of_use_in_no_file_is_refused(
    example: Example, name: str
) -> None:
    columns: dict[str, Any] = {name: [{"a": 1}] * 3}
    for path in (example.file, example.input / "deep" / "b.pq", example.input / "none.parquet"):
        write_rows(path, range(3), **columns)
    said = f"^--input: no file can be scored, such as a.parquet column '{name}' has .* --{name}-col"
    with pytest.raises(RequestError, match=said):
        example.score(label_column="label")
    assert not example.output.exists()


def another_run_finds(name: str) -> Any:
    """A file that is new, or one that was broken. What it has put must stay."""

    def act(example: Example) -> None:
        write_rows(example.input / name, range(5))
        example.score()

    return act


def another_run_begins_and_scores(example: Example) -> None:
    example.give_id("another")
    example.score(overwrite=True)


OTHER_RUNS = [
    (another_run_finds("broken.parquet"), "predictions/broken-00000"),
    (another_run_finds("more.parquet"), "predictions/more-00000"),
    (lambda example: (example.output / OF_A[1]).unlink(), OF_A[1]),
    (lose_rows, OF_A[1]),
    (another_run_begins_and_scores, "run.json"),
    (another_run_begins, "run.json"),
]


@pytest.mark.parametrize(("acts", "name"), OTHER_RUNS)
def test_a_run_publishes_nothing_where_another_one_was_at_work(
    example: Example, acts: Any, name: str
) -> None:
    others: dict[str, bytes] = {}

    def execute(*given: Any) -> Any:
        yield from score_without_ray(*given)
        acts(example)
        others.update(example.files())

    with pytest.raises(TryAgainError, match=f"{name}.* is missing or was written by another run"):
        example.score(execute)
    assert example.files() == others


@pytest.mark.parametrize("before", ["files.parquet", "manifest.json"])
def test_a_run_that_begins_while_another_publishes_gets_no_manifest_of_it(
    before: str, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has deleted the rows, and begun, just before the other run writes a file about them."""
    write_as_before = Location.write

    def write(place: Location, data: Any) -> None:
        if place.path.endswith(before):
            another_run_begins(example)
        write_as_before(place, data)

    monkeypatch.setattr(Location, "write", write)
    with pytest.raises(TryAgainError, match=r"run.json is missing or was written by another run"):
        example.score()
    assert not (example.output / "manifest.json").exists()


def test_parts_that_a_later_run_has_put_of_a_changed_file_stay(example: Example) -> None:
    """They have the names of parts that the first run, which cannot use the file, would delete."""

    def execute(*given: Any) -> Any:
        write_rows(example.file, range(20, 30))
        example.score()
        return score_without_ray(*given)

    with pytest.raises(TryAgainError, match=f"{OF_A[0]} is missing or was written by another run"):
        example.score(execute)
    assert example.score().resumed_rows == 13


def test_a_file_that_appears_while_a_run_scores_is_left_for_the_next_one(example: Example) -> None:
    more = example.input / "more.parquet"

    def execute(*given: Any) -> Any:
        assert not (example.output / "manifest.json").exists(), "the output is not finished"
        if not more.exists():
            write_rows(more, [13])
        return score_without_ray(*given)

    assert example.score(execute).input_rows == 13
    again = example.score(execute)
    assert (again.input_rows, again.resumed_rows) == (14, 13)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_storage_that_does_not_answer_is_no_fault_of_the_file(
    example: Example, overwrite: bool
) -> None:
    def execute(*given: Any) -> Any:
        example.input.rename(example.folder / "away")
        return score_without_ray(*given)

    goes_on = "the same command without --overwrite continues" if overwrite else "the same command"
    said = f"^{example.file}: does not exist.*; what is scored is kept, and {goes_on}"
    with pytest.raises(TryAgainError, match=said):
        example.score(execute, overwrite=overwrite)
    assert example.files(*TIMED).keys() == {"run.json"}


@pytest.mark.slow
def test_a_bucket_is_asked_once_for_a_row_group_of_many_parts(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is larger than what is read ahead."""
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 2**18)
    write_rows(example.file, range(6000), row_group_size=6000)
    data, sent = example.file.read_bytes(), []
    app = DomainDispatcherApplication(create_backend_app)

    def count(environ: Any, start_response: Any) -> Any:
        answer = [*app(environ, start_response)]
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith("/a.parquet"):
            sent.append(len(b"".join(answer)))
        return answer

    with serve_s3(monkeypatch, count) as uri:
        (locate(uri, "--input") / "in/a.parquet").write(data)
        source = (locate(uri, "--input") / "in").display
        example.score(input=source, max_rows_per_file=1500, batch_size=256)
    assert len(data) < sum(sent) < 1.2 * len(data)


def test_a_repeated_task_reads_what_is_missing_and_gives_as_many_answers(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray leaves out the answers that it has."""
    monkeypatch.setattr(actor, "_JOINED_BYTES", 1)
    ranges: list[Any] = []

    def read(file: Any, wanted: Any, batch_rows: int) -> Any:
        ranges.append(wanted)
        return read_ranges(file, wanted, batch_rows)

    def execute(*given: Any) -> Any:
        answers = [*score_without_ray(*given)]
        (example.output / OF_A[1]).unlink()
        ranges.clear()
        again = [*score_without_ray(*given)]
        assert [answer.rows for answer in again] == [answer.rows for answer in answers]
        assert ranges == [[range(4, 8), range(8, 10)], [range(3)], [range(0)]]
        return again

    monkeypatch.setattr(actor, "read_ranges", read)
    assert example.score(execute).scored_rows == 11


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_runs_of_one_request_at_once_give_the_files_of_one(
    where: str, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"max_rows_per_file": 1}
    example.score(**one)
    undisturbed = example.files(*TIMED)
    with serve_s3(monkeypatch) if where == "s3" else nullcontext(str(example.folder)) as uri:
        both = locate(uri, "--output") / "both"
        with ThreadPoolExecutor(2) as pool:
            runs = pool.map(lambda _: example.score(output=both.display, **one), range(2))
        assert [run.scored_rows for run in runs] == [11, 11]
        assert len(both.files()) == len(undisturbed) + 2, "manifest and report"
        assert {name: (both / name).read_bytes() for name in undisturbed} == undisturbed
