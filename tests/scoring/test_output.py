"""The output folder: what is in it, what is refused, and what a later command makes of it."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError, RowCountError, RunError
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring.driver import run
from mnistsum_ray.storage.uri import locate
from tests.conftest import check_predictions, plain_predictions, write_model
from tests.scoring.conftest import CONSOLE, preflight_of, score_here, write_rows
from tests.storage.conftest import s3

ADDED = ["pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
OF_A = [f"predictions/a-0000{part}-of-00003.parquet" for part in range(3)]
PARTS = {*OF_A, "predictions/deep/b.pq", "predictions/none.parquet"}

# pyarrow cannot take rows of views, and cannot cast a slice of structs with a null child.
_MAPS = [None, *([("k", str(row))] for row in range(9))]
VIEWS = {
    "view": pa.array([None, *"bcdefghij"], pa.string_view()),
    "list_view": pa.array([None, *([row] * row for row in range(9))], pa.list_view(pa.int64())),
    "map": pa.array(_MAPS, pa.map_(pa.string(), pa.string_view())),
    "null_in_a_struct": pa.array([{"a": [{"b": row, "c": None}]} for row in range(10)]),
}


def rewrite(path: Path, **columns: Any) -> None:
    """Write a file again with other columns."""
    table = pq.ParquetFile(path).read()
    kept = {name: table[name] for name in table.column_names}
    pq.write_table(pa.table(kept | columns), path, row_group_size=4, write_page_checksum=True)


class World:
    """Input of ten rows in three parts, of three rows, of none, and of no Parquet; the output."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.input, self.output = folder / "in", folder / "out"
        self.file = self.input / "a.parquet"
        write_rows(self.file, range(10), bad=3)
        self.images = pq.read_table(self.file)["image"].to_pylist()
        self.images[6] = None
        images, labels = pa.array(self.images, pa.binary_view()), [0, 12, None, *range(3, 10)]
        rewrite(self.file, image=images, label=labels, **VIEWS)
        write_rows(self.input / "deep" / "b.pq", range(10, 13))
        write_rows(self.input / "none.parquet", [])
        (self.input / "broken.parquet").write_bytes(b"not Parquet")

    def score(self, execute: Any = score_here, **settings: Any) -> ScoreResult:
        given: dict[str, Any] = {"model": self.model, "output": self.output}
        given |= {"max_rows_per_file": 4} | settings
        model, output = given.pop("model"), given.pop("output")
        return run(preflight_of(model, self.input, output, **given), execute, CONSOLE)

    def files(self) -> dict[str, bytes]:
        """The files in the output that have no time in them."""
        files = [path for path in self.output.rglob("*") if path.is_file()]
        found = {str(path.relative_to(self.output)): path.read_bytes() for path in files}
        for timed in {"report.html", "manifest.json"} & found.keys():
            del found[timed]
        return found

    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return value

    def listed(self) -> list[list[Any]]:
        """The rows of files.parquet."""
        rows = pq.read_table(self.output / "files.parquet").to_pylist()
        return [[*row.values()] for row in rows]


@pytest.fixture
def world(tmp_path: Path, model: Path) -> World:
    return World(tmp_path, model)


@pytest.mark.parametrize("probabilities", [False, True])
def test_each_input_row_is_one_output_row_in_its_order(world: World, probabilities: bool) -> None:
    assert world.score(probabilities=probabilities).scored_rows == 11
    added = [*ADDED, "digit_probs", "sum_probs"] if probabilities else ADDED
    assert world.files().keys() == PARTS | {"run.json", "files.parquet"}
    outputs = {name: pq.ParquetFile(world.output / name).read() for name in PARTS}
    output = outputs["predictions/a.parquet"] = pa.concat_tables([outputs[name] for name in OF_A])
    for name in ("a.parquet", "deep/b.pq", "none.parquet"):
        given, found = pq.ParquetFile(world.input / name).read(), outputs[f"predictions/{name}"]
        names = [column for column in given.column_names if column != "image"]
        assert found.column_names == [*names, *added, "reason"]
        assert found.select(names).to_pylist() == given.select(names).to_pylist()
    reasons = dict(enumerate(output["reason"].to_pylist()))
    assert reasons.pop(3) == "the number is 99, not one of 0..9; correct it or drop the row"
    assert reasons.pop(6) == "the image is null; fill it in or drop the row"
    assert not any(reasons.values())
    assert all(np.flatnonzero(output[column].is_null()).tolist() == [3, 6] for column in added)
    good = [*reasons]
    images = np.stack([np.frombuffer(world.images[row], np.uint8) for row in good])
    expected = plain_predictions(world.model, images.reshape(-1, 28, 28), np.array(good))
    check_predictions(output.take(good), expected)
    broken = "is not Parquet, or was cut off; write it again"
    assert world.listed() == [
        ["a.parquet", 10, 8, 2, 0, "scored", None],
        ["broken.parquet", None, 0, 0, None, "failed", broken],
        ["deep/b.pq", 3, 3, 0, 0, "scored", None],
        ["none.parquet", 0, 0, 0, 0, "scored", None],
    ]
    for name in OF_A:
        stamp = outputs[name].schema.metadata[b"mnistsum_ray.part"]
        assert json.loads(stamp)["input"] == "a.parquet"


def test_counts_of_a_fresh_run_and_of_a_resumed_one_are_those_of_its_rows(world: World) -> None:
    with pytest.raises(RowCountError, match="26 rows were counted, and 13 are in the output"):
        world.score(lambda *given: [*score_here(*given)] * 2, output=world.folder / "other")
    world.score(label_column="label")
    fresh, files = world.manifest(), world.files()
    for name in ("manifest.json", OF_A[0], "predictions/deep/b.pq"):
        (world.output / name).unlink()
    with pytest.raises(RowCountError, match=f"{OF_A[0]} is not in the output"):
        world.score(lambda *_: [], label_column="label")
    assert world.score(label_column="label").resumed_rows == 6
    assert world.files() == files
    resumed = world.manifest()
    assert resumed == fresh | {name: resumed[name] for name in ("totals", "finished")}
    rows = f"read_parquet('{world.output}/predictions/**/*.p*q*', union_by_name=true)"
    known = "FILTER (label BETWEEN 0 AND 9)"
    query = f"""SELECT count(*) FILTER (pred_sum = pred_digit + number), count(*) {known},
        avg((pred_digit = label)::INT) {known}, avg((pred_sum = label + number)::INT) {known}
        FROM {rows} WHERE reason IS NULL"""
    reasons = f"SELECT reason, count(*) FROM {rows} WHERE reason IS NOT NULL GROUP BY 1"
    with duckdb.connect() as database:
        counts = database.execute(query).fetchone()
        rejected = dict(database.execute(reasons).fetchall())
    found = [fresh[name] for name in ("consistent_rows", "labelled_rows")]
    for totals in (fresh["totals"], resumed["totals"]):
        assert counts == (*found, totals["digit_accuracy"], totals["sum_accuracy"])
    assert fresh["rejected_by_reason"] == rejected


def write(name: str, data: bytes = b"of another program") -> Any:
    return lambda world: (world.folder / name).write_bytes(data)


def copy(source: str, name: str) -> Any:
    return lambda world: shutil.copy(world.folder / source, world.folder / name)


def replace_within_a_second(world: World) -> None:
    """With a file of the same size and the same time, in seconds."""
    other, before = world.file.with_suffix(".new"), world.file.stat()
    other.write_bytes(world.file.read_bytes())
    os.utime(other, (before.st_atime, int(before.st_mtime)))
    other.replace(world.file)


OTHER_VERSION = b'{"format": "mnistsum_ray.score/1", "version": "0.0.1", "request": {}}'
AGAIN = "--overwrite deletes that output and scores everything again"
BEGUN = f"was begun with {{}}, and this run has {{}}; give the same again, or {AGAIN}"
OTHER = "has rows of a.parquet, which has changed since, or of another request"
VERSION = BEGUN.format("format mnistsum_ray.score/1", "mnistsum_ray.score/2")
AWAY = "move it away, or choose another folder"
REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (bool, {"max_rows_per_file": None}, BEGUN.format("--max-rows-per-file 4", None)),
    (bool, {"label_column": "number"}, BEGUN.format("--label-column None", "number")),
    (bool, {"precision": "bf16"}, BEGUN.format("--precision fp32", "bf16")),
    (write("out/run.json", OTHER_VERSION), {}, VERSION),
    (lambda world: rewrite(world.file, number=[1] * 10), {}, f"{OF_A[0]} {OTHER}; {AGAIN}"),
    (replace_within_a_second, {}, f"{OF_A[0]} {OTHER}; {AGAIN}"),
    (copy(f"out/{OF_A[0]}", f"out/{OF_A[1]}"), {}, f"{OF_A[1]} {OTHER}; {AGAIN}"),
    (copy(f"other/{OF_A[1]}", f"out/{OF_A[1]}"), {}, f"{OF_A[1]} {OTHER}; {AGAIN}"),
    (write("out/notes.txt"), {}, f"notes.txt is not a file of this program; {AWAY}"),
    (write(f"out/{OF_A[1]}"), {}, f"{OF_A[1]} is not a file of this program"),
    (copy("in/deep/b.pq", f"out/{OF_A[1]}"), {}, f"{OF_A[1]} is not a file of this program"),
    (write("out/run.json"), {}, "its run.json is not of this program; choose another folder"),
]


@pytest.mark.parametrize(("change", "settings", "message"), REFUSALS)
def test_what_is_refused_changes_nothing(
    world: World, change: Any, settings: dict[str, Any], message: str
) -> None:
    """Where it is offered, --overwrite then gives what an empty folder would."""
    world.score()
    world.score(output=world.folder / "other", precision="bf16")
    others = dict.fromkeys((".notes", "predictions/.DS_Store"), b"of another program")
    for name in others:
        write(f"out/{name}")(world)
    change(world)
    before = world.files()
    for overwrite in (False,) if AGAIN in message else (False, True):
        with pytest.raises(RequestError, match=re.escape(message)):
            world.score(**settings, overwrite=overwrite)
        assert world.files() == before
    if AGAIN in message:
        world.score(**settings, overwrite=True)
        overwritten = world.files()
        shutil.rmtree(world.output)
        world.score(**settings)
        assert overwritten == world.files() | others


def test_output_of_input_that_is_gone_stays(world: World) -> None:
    world.score(overwrite=True)
    before = world.files()
    sha256 = "[0-9a-f]{64}"
    said = rf"was begun with --model with SHA-256 {sha256}, and this run has {sha256};"
    with pytest.raises(RequestError, match=said):
        world.score(model=write_model(world.folder / "model", 1))
    world.file.rename(world.folder / "a.parquet")
    assert world.score().resumed_rows == 3
    assert world.manifest()["files_of_earlier_input"] == 3
    shutil.rmtree(world.input / "deep")
    (world.input / "none.parquet").unlink()
    (world.folder / "a.parquet").rename(world.file)
    assert world.score().resumed_rows == 10
    assert {name: world.files()[name] for name in PARTS} == {name: before[name] for name in PARTS}


def test_strict_ends_without_a_manifest_and_the_run_without_it_scores_nothing(world: World) -> None:
    world.score()
    with pytest.raises(RunError, match="--strict: 2 rows and 1 file cannot be used"):
        world.score(strict=True)
    assert not (world.output / "manifest.json").exists()
    assert world.score().resumed_rows == 13
    world.file.unlink()
    (world.input / "broken.parquet").unlink()
    assert world.score(strict=True).rejected_rows == 0


def test_a_file_that_cannot_be_read_costs_itself_alone(world: World) -> None:
    """The last page of one is damaged, and another is replaced while it is scored."""
    world.score()
    undisturbed, data = world.files(), bytearray(world.file.read_bytes())
    shutil.rmtree(world.output)
    column = pq.read_metadata(world.file).row_group(2).column(1)
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    whole = {"a.parquet": world.file, "b.pq": world.input / "deep" / "b.pq"}

    def replace(name: str) -> None:
        whole[name].rename(world.folder / name)
        whole[name].write_bytes(data)

    def execute(*given: Any) -> Any:
        replace("b.pq")
        return score_here(*given)

    replace("a.parquet")
    world.score(execute)
    assert world.files().keys() == {"run.json", "files.parquet", "predictions/none.parquet"}
    damaged, _, replaced, none = world.listed()
    assert damaged[:6] == ["a.parquet", 10, 0, 0, 10, "failed"]
    assert replaced[:6] == ["deep/b.pq", 3, 0, 0, 3, "failed"]
    assert "CRC" in damaged[6]
    assert "has changed since the run began" in replaced[6]
    assert none[5] == "scored"
    for name, path in whole.items():
        (world.folder / name).replace(path)
    world.score()
    assert world.files() == undisturbed


def test_a_storage_that_does_not_answer_is_no_fault_of_the_file(world: World) -> None:
    def execute(*given: Any) -> Any:
        world.input.rename(world.folder / "away")
        return score_here(*given)

    with pytest.raises(RunError, match=rf"^--input {world.input}/\S+: .*; what is scored is kept"):
        world.score(execute)
    assert world.files().keys() == {"run.json"}
    (world.folder / "away").rename(world.input)
    assert world.score().failed_files == 1


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_runs_of_one_request_at_once_give_the_files_of_one(
    where: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.score(max_rows_per_file=1)
    undisturbed = world.files()
    server = s3(monkeypatch, world.folder) if where == "s3" else nullcontext(str(world.folder))
    with server as uri:
        both = locate(uri, "--output") / "both"
        with ThreadPoolExecutor(2) as pool:
            one = {"output": both.display, "max_rows_per_file": 1}
            results = pool.map(lambda _: world.score(**one).scored_rows, range(2))
        assert [*results] == [11, 11]
        assert len(both.files()) == len(undisturbed) + 2, "manifest and report"
        assert {name: (both / name).read_bytes() for name in undisturbed} == undisturbed


def test_a_run_that_begins_and_ends_while_another_puts_a_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each file that one creates on a disk: the other runs before it gets its name."""
    world.score()
    undisturbed, link, left = world.files(), os.link, [0]

    def call(*paths: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            world.score()
        link(*paths)

    monkeypatch.setattr(os, "link", call)
    for nth in range(1, len(undisturbed)):
        shutil.rmtree(world.output)
        left[0] = nth
        world.score()
        assert left[0] <= 0
        assert world.files() == undisturbed
