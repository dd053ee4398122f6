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

from mnistsum_ray import __version__
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
METADATA = {
    "org.apache.spark.sql.parquet.row.metadata": "{}",
    "mnistsum_ray.part": "of input",
    "mine": "yes",
}
VIEWS = {  # pyarrow cannot take rows of views, and cannot cast a slice of structs with a null child
    "view": pa.array([None, *"bcdefghij"], pa.string_view()),
    "list_view": pa.array([None, *([row] * row for row in range(9))], pa.list_view(pa.int64())),
    "map": pa.array(
        [None, *([("k", str(row))] for row in range(9))], pa.map_(pa.string(), pa.string_view())
    ),
    "null_in_a_struct": pa.array([{"a": [{"b": row, "c": None}]} for row in range(10)]),
}


def rewrite(path: Path, **columns: Any) -> None:
    """Write a file again with other columns."""
    table = pq.ParquetFile(path).read()
    table = pa.table(
        {name: table[name] for name in table.column_names} | columns, metadata=METADATA
    )
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True)


class World:
    """Input of ten rows in three parts, of three rows, of none, and of no Parquet; and its output."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.input, self.output = (
            folder,
            model,
            folder / "in",
            folder / "out",
        )
        self.file = self.input / "a.parquet"
        write_rows(self.file, range(10), bad=3)
        self.images = pq.read_table(self.file)["image"].to_pylist()
        self.images[6] = None
        rewrite(
            self.file,
            image=pa.array(self.images, pa.binary_view()),
            label=[0, 12, None, *range(3, 10)],
            **VIEWS,
        )
        write_rows(self.input / "deep" / "b.pq", range(10, 13))
        write_rows(self.input / "none.parquet", [])
        (self.input / "broken.parquet").write_bytes(b"not Parquet")

    def score(
        self, execute: Any = score_here, model: Any = "", output: Any = "", **settings: Any
    ) -> ScoreResult:
        given = {"max_rows_per_file": 4} | settings
        return run(
            preflight_of(model or self.model, self.input, output or self.output, **given),
            execute,
            CONSOLE,
        )

    def files(self) -> dict[str, bytes]:
        """The files in the output that have no time in them."""
        names = [
            str(path.relative_to(self.output)) for path in self.output.rglob("*") if path.is_file()
        ]
        return {
            name: (self.output / name).read_bytes()
            for name in names
            if name not in ("report.html", "manifest.json")
        }

    def about(self) -> tuple[dict[str, Any], list[list[Any]]]:
        """The manifest, and the rows of files.parquet."""
        rows = pq.read_table(self.output / "files.parquet").to_pylist()
        return json.loads((self.output / "manifest.json").read_text()), [
            [*row.values()] for row in rows
        ]


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
    number, image = (
        "the number is 99, not one of 0..9; correct it or drop",
        "the image is null; fill it in or drop",
    )
    assert output["reason"].to_pylist() == [
        *[None] * 3,
        f"{number} the row",
        None,
        None,
        f"{image} the row",
        *[None] * 3,
    ]
    assert all(np.flatnonzero(output[column].is_null()).tolist() == [3, 6] for column in added)
    good = [0, 1, 2, 4, 5, 7, 8, 9]
    images = np.stack([np.frombuffer(world.images[row], np.uint8).reshape(28, 28) for row in good])
    check_predictions(output.take(good), plain_predictions(world.model, images, np.array(good)))
    assert world.about()[1] == [
        ["a.parquet", 10, 8, 2, 0, "scored", None],
        [
            "broken.parquet",
            None,
            0,
            0,
            None,
            "failed",
            "is not Parquet, or was cut off; write it again",
        ],
        ["deep/b.pq", 3, 3, 0, 0, "scored", None],
        ["none.parquet", 0, 0, 0, 0, "scored", None],
    ]
    request = preflight_of(
        world.model, world.input, "out", max_rows_per_file=4, probabilities=probabilities
    )
    for part, name in enumerate(OF_A):
        stamp = {
            "request": request.digest,
            "input": "a.parquet",
            "e_tag": request.files[0].e_tag,
            "first_row": 4 * part,
        }
        assert outputs[name].schema.metadata == {b"mnistsum_ray.part": json.dumps(stamp).encode()}


def test_counts_of_a_fresh_run_and_of_a_resumed_one_are_those_of_its_rows(world: World) -> None:
    with pytest.raises(RowCountError, match="26 rows were counted, and 13 are in the output"):
        world.score(lambda *given: [*score_here(*given)] * 2, output=world.folder / "other")
    world.score(label_column="label")
    (fresh, _), files = world.about(), world.files()
    for name in ("manifest.json", OF_A[0], "predictions/deep/b.pq"):
        (world.output / name).unlink()
    with pytest.raises(RowCountError, match=f"a.parquet: its rows 0 to 3 are not in {OF_A[0]}"):
        world.score(lambda *_: [], label_column="label")
    assert world.score(label_column="label").resumed_rows == 6
    assert world.files() == files
    resumed, _ = world.about()
    assert resumed == fresh | {name: resumed[name] for name in ("totals", "finished")}
    rows = f"FROM read_parquet('{world.output}/predictions/**/*.p*q*', union_by_name=true)"
    known = "FILTER (label BETWEEN 0 AND 9)"
    columns = f"""count(*) FILTER (pred_sum = pred_digit + number), count(*) {known},
        avg((pred_digit = label)::INT) {known}, avg((pred_sum = label + number)::INT) {known}"""
    with duckdb.connect() as database:
        counts = database.execute(f"SELECT {columns} {rows} WHERE reason IS NULL").fetchone()
        reasons = database.execute(
            f"SELECT reason, count(*) {rows} WHERE reason IS NOT NULL GROUP BY 1"
        ).fetchall()
    found = [fresh[name] for name in ("consistent_rows", "labelled_rows")]
    for totals in (fresh["totals"], resumed["totals"]):
        assert counts == (*found, totals["digit_accuracy"], totals["sum_accuracy"])
    assert fresh["rejected_by_reason"] == dict(reasons)


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
CHANGED = f"{OF_A[0]} has rows of a.parquet, which has changed since; {AGAIN}"
AWAY = "move it away, or choose another folder"
REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (bool, {"max_rows_per_file": None}, BEGUN.format("--max-rows-per-file 4", None)),
    (bool, {"label_column": "number"}, BEGUN.format("--label-column None", "number")),
    (bool, {"probabilities": True}, BEGUN.format("--probabilities False", True)),
    (bool, {"precision": "bf16"}, BEGUN.format("--precision fp32", "bf16")),
    (
        write("out/run.json", OTHER_VERSION),
        {},
        f"version 0.0.1 of mnistsum_ray, and this is {__version__}; {AGAIN}",
    ),
    (lambda world: rewrite(world.file, number=[1] * 10), {}, CHANGED),
    (replace_within_a_second, {}, CHANGED),
    (
        lambda world: world.file.rename(world.input / "c.parquet"),
        {},
        f"twice; name it as before, or {AGAIN}",
    ),
    (copy(f"out/{OF_A[0]}", f"out/{OF_A[1]}"), {}, f"than it should have; {AGAIN}"),
    (copy(f"other/{OF_A[1]}", f"out/{OF_A[1]}"), {}, f"{OF_A[1]} is of another request; {AGAIN}"),
    (write("out/notes.txt"), {}, f"notes.txt is not a file of this program; {AWAY}"),
    (
        write(f"out/{OF_A[1]}"),
        {},
        f"{OF_A[1]} is not Parquet, or was cut off; write it again; {AWAY}",
    ),
    (
        copy("in/deep/b.pq", f"out/{OF_A[1]}"),
        {},
        f"{OF_A[1]} is not a file of this program; {AWAY}",
    ),
    (
        lambda world: (world.output / "run.json").unlink(),
        {},
        f"is not a file of this program; {AWAY}",
    ),
    (write("out/run.json"), {}, "its run.json is not of this program; choose another folder"),
    (
        write("out/run.json", b'{"format": "csv", "version": 1, "request": {}}'),
        {},
        "its run.json is not of this program",
    ),
]


@pytest.mark.parametrize(
    ("change", "settings", "message"), REFUSALS, ids=[message for *_, message in REFUSALS]
)
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
    with pytest.raises(
        RequestError,
        match=r"was begun with --model with SHA-256 [0-9a-f]{64}, and this run has [0-9a-f]{64};",
    ):
        world.score(model=write_model(world.folder / "model", 1))
    world.file.rename(world.folder / "a.parquet")
    assert (world.score().resumed_rows, world.about()[0]["files_of_earlier_input"]) == (3, 3)
    shutil.rmtree(world.input / "deep")
    (world.input / "none.parquet").unlink()
    with pytest.raises(
        RequestError, match="--overwrite: nothing was deleted, since no file of --input"
    ):
        world.score(overwrite=True)
    (world.folder / "a.parquet").rename(world.file)
    assert world.score().resumed_rows == 10
    assert {name: world.files()[name] for name in PARTS} == {name: before[name] for name in PARTS}
    shutil.rmtree(world.output / "predictions")
    (world.output / "run.json").unlink()
    with pytest.raises(RequestError, match=r"files.parquet is not a file of this program"):
        world.score(overwrite=True)


def test_strict_ends_without_a_manifest_and_the_run_without_it_scores_nothing(world: World) -> None:
    world.score()
    message = r"--strict: 2 rows and 1 file cannot be used, so there is no manifest.json; report.html and files.parquet say why"
    with pytest.raises(RunError, match=message):
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

    def replace(name: str) -> int:
        whole[name].rename(world.folder / name)
        return whole[name].write_bytes(data)

    replace("a.parquet")
    world.score(lambda *given: score_here(*given) if replace("b.pq") else [])
    assert world.files().keys() == {"run.json", "files.parquet", "predictions/none.parquet"}
    damaged, _, replaced, none = world.about()[1]
    assert (damaged[:6], replaced[:6]) == (
        ["a.parquet", 10, 0, 0, 10, "failed"],
        ["deep/b.pq", 3, 0, 0, 3, "failed"],
    )
    assert ("CRC" in damaged[6], "has changed since the run began" in replaced[6], none[5]) == (
        True,
        True,
        "scored",
    )
    for name, path in whole.items():
        (world.folder / name).replace(path)
    world.score()
    assert world.files() == undisturbed


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_runs_of_one_request_at_once_give_the_files_of_one(
    where: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.score(max_rows_per_file=1)
    undisturbed = world.files()
    with s3(monkeypatch, world.folder) if where == "s3" else nullcontext(str(world.folder)) as uri:
        both = locate(uri, "--output") / "both"
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(
                lambda _: world.score(output=both.display, max_rows_per_file=1).scored_rows,
                range(2),
            )
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
