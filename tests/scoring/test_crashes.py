"""A crash at every operation on the storage, and then each of the commands that a user may give.

The driver, the worker and the files are real; the n-th write, create or delete crashes before it is
done, after it, or fails. What is there is read with pyarrow alone.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError, RunError, StorageError
from mnistsum_ray.storage.store import Location
from tests.conftest import write_model
from tests.scoring.conftest import score, write_rows

OPERATIONS = ("write", "create", "delete_files")


class Crash(BaseException):
    """The process ends here: nobody handles it."""


class Store:
    """Counts the operations that change the storage; the n-th one goes wrong."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.how = ""
        for name in OPERATIONS:
            patch.setattr(Location, name, self._faulty(getattr(Location, name)))

    def _faulty(self, operation: Callable[..., None]) -> Callable[..., None]:
        def call(place: Location, argument: Any) -> None:
            self.left -= 1
            if self.left != 0:
                operation(place, argument)
                return
            if self.how == "fails":
                raise StorageError(f"{place.display}: cannot be written: no space left on device")
            if self.how == "crashes after":
                operation(place, argument)
            elif operation.__name__ == "delete_files":  # of many files some are gone
                operation(place, argument[: len(argument) // 2])
            raise Crash

        return call


class World:
    """Input, output and the commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [write_model(folder / str(seed), seed) for seed in (0, 1)]
        self.input, self.output, self.away = folder / "in", folder / "out", folder / "away"
        write_rows(self.input / "a.parquet", [0, 1, 2], bad=2)
        write_rows(self.input / "sub" / "b.parquet", [3])
        write_rows(self.away / "more.parquet", [4, 5])
        (self.input / "bad.parquet").write_bytes(b"not Parquet")

    def move(self, old: str, new: str) -> None:
        (self.folder / old).rename(self.folder / new)

    def begin(self, more: bool) -> None:
        """An empty output but for a file of another program; and two input files, or one more."""
        if more != (self.input / "more.parquet").exists():
            old, new = ("away", "in") if more else ("in", "away")
            self.move(f"{old}/more.parquet", f"{new}/more.parquet")
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        (self.output / ".notes").write_text("of another program")

    def score(self, model: int = 0, **settings: Any) -> str:
        """Score; how it ended. A refusal must change nothing."""
        before = self.files()
        try:
            score(self.models[model], self.input, self.output, max_rows_per_file=2, **settings)
        except RequestError:
            assert self.files() == before
            return "refused"
        except (RunError, StorageError):
            return "failed"
        except Crash:
            return "crashed"
        finally:
            rows = self.check()
        for path in {*self.input.rglob("*.parquet")} - {self.input / "bad.parquet"}:
            assert rows[str(path.relative_to(self.input))] == pq.read_table(path)["id"].to_pylist()
        assert "manifest.json" in self.files()
        return "done"

    def files(self) -> dict[str, bytes]:
        files = [path for path in self.output.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.output)): path.read_bytes() for path in files}

    def predictions(self) -> dict[str, bytes]:
        """The files in which no time is."""
        files = self.files()
        timed = {"manifest.json", "report.html", "run.json", ".notes"}
        return {name: files[name] for name in files.keys() - timed}

    def check(self) -> dict[str, list[int]]:
        """Each file is whole and of one request; with a manifest each row is there once.

        Returns the rows by input file.
        """
        files = self.files()
        assert files[".notes"] == b"of another program"
        rows: dict[str, list[int]] = {}
        requests = set()
        for path in sorted((self.output / "predictions").rglob("[!.]*.parquet")):
            table = pq.read_table(path)
            stamp = json.loads(pq.read_metadata(path).metadata[b"mnistsum_ray.part"])
            requests.add(stamp["request"])
            assert table["reason"].is_null().equals(table["pred_sum"].is_valid())
            rows.setdefault(stamp["input"], []).extend(table["id"].to_pylist())
        assert len(requests) <= 1
        every = list(itertools.chain(*rows.values()))
        assert len(every) == len(set(every))
        if "manifest.json" in files:
            assert {"run.json", "report.html"} <= files.keys()
            listed = pq.read_table(self.output / "files.parquet").to_pylist()
            scored = {row["file"]: row["rows"] for row in listed if row["status"] == "scored"}
            assert {name: len(ids) for name, ids in rows.items() if name in scored} == scored
            earlier = json.loads(files["manifest.json"])["files_of_earlier_input"]
            assert len(rows.keys() - scored.keys()) == earlier
        return rows


def same(world: World) -> None:
    pass


def strict(world: World) -> None:
    assert world.score(strict=True) == "failed"
    assert "manifest.json" not in world.files()


def overwrite(world: World) -> None:
    assert world.score(overwrite=True) == "done"


def another_model(world: World) -> None:
    if world.score(model=1) == "done":  # nothing had begun
        assert world.score() == "refused"
        assert world.score(overwrite=True) == "done"


def new_file(world: World) -> None:
    world.move("away/more.parquet", "in/more.parquet")
    assert world.score() == "done"
    assert "predictions/more.parquet" in world.files()


def file_gone(world: World) -> None:
    world.move("in/sub/b.parquet", "away/b.parquet")
    assert world.score() == "done"
    world.move("away/b.parquet", "in/sub/b.parquet")


CASES: list[Any] = [(first, same) for first in ("begin", "overwrite", "go on", "add")]
SLOW = [("begin", command) for command in (overwrite, new_file, strict, another_model, file_gone)]
SLOW += [("overwrite", new_file), ("overwrite", another_model), ("go on", new_file)]
SLOW += [("add", overwrite), ("add", file_gone)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("first", "command"), CASES)
def test_a_crash_at_any_operation_loses_and_repeats_nothing(
    first: str, command: Callable[[World], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first run, one with --overwrite, one that goes on, and one that finds a new file."""
    world, store = World(tmp_path), Store(monkeypatch)
    more = first == "add" or command is new_file
    world.begin(more)
    assert world.score() == "done"
    undisturbed = world.predictions()
    hit = 0
    for how in ("crashes before", "crashes after", "fails"):
        for n in itertools.count(1):
            world.begin(more=False)
            if first in ("overwrite", "add"):
                world.score()
            if first == "add":
                world.move("away/more.parquet", "in/more.parquet")
            if first == "go on":
                store.left, store.how = 3, "crashes after"
                assert world.score() == "crashed"
            store.left, store.how = n, how
            ended = world.score(overwrite=first == "overwrite")
            is_over = store.left > 0
            store.left = -1
            assert ended == ("done" if is_over else "failed" if how == "fails" else "crashed")
            command(world)
            assert world.score() == "done"
            assert world.predictions() == undisturbed
            if is_over:
                break
            hit += 1
    assert hit >= 3 * 4
