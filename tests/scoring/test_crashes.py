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
from tests.scoring.conftest import files_in, score, write_rows

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
        self.models = [write_model(folder / str(seed), seed) for seed in (0, 1)]
        self.input, self.output = folder / "in", folder / "out"
        self.more = [folder / "more.parquet", self.input / "more.parquet"]
        write_rows(self.input / "a.parquet", [0, 1, 2], bad=2)
        write_rows(self.input / "sub" / "b.parquet", [3])
        write_rows(self.more[0], [4, 5])
        (self.input / "bad.parquet").write_bytes(b"not Parquet")

    def begin(self, more: bool) -> None:
        """An empty output but for a file of another program; and two input files, or one more."""
        if self.more[not more].exists():
            self.more[not more].rename(self.more[more])
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        (self.output / ".notes").write_text("of another program")

    def score(self, model: int = 0, **settings: Any) -> str:
        """Score; how it ended. A refusal must change nothing."""
        before = files_in(self.output)
        try:
            score(self.models[model], self.input, self.output, max_rows_per_file=2, **settings)
        except RequestError:
            assert files_in(self.output) == before
            return "refused"
        except (RunError, StorageError):
            return "failed"
        except Crash:
            return "crashed"
        finally:
            rows = self.check()
        for path in {*self.input.rglob("*.parquet")} - {self.input / "bad.parquet"}:
            assert rows[str(path.relative_to(self.input))] == pq.read_table(path)["id"].to_pylist()
        assert "manifest.json" in files_in(self.output)
        return "done"

    def predictions(self) -> dict[str, bytes]:
        """The files in which no time is."""
        timed = ("manifest.json", "report.html", "run.json", ".notes")
        return {name: data for name, data in files_in(self.output).items() if name not in timed}

    def check(self) -> dict[str, list[int]]:
        """Each file is whole and of one request; with a manifest each row is there once.

        Returns the rows by input file.
        """
        files = files_in(self.output)
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
            listed = pq.read_table(self.output / "files.parquet").to_pylist()
            scored = {row["file"]: row["rows"] for row in listed if row["status"] == "scored"}
            assert {name: len(ids) for name, ids in rows.items()} == scored
            assert {"run.json", "report.html"} <= files.keys()
        return rows


def same(world: World) -> None:
    pass


def overwrite(world: World) -> None:
    assert world.score(overwrite=True) == "done"


def another_model(world: World) -> None:
    if world.score(model=1) == "done":  # nothing had begun
        assert world.score() == "refused"
        assert world.score(overwrite=True) == "done"


def new_file(world: World) -> None:
    world.more[0].rename(world.more[1])
    assert world.score() == "done"


CASES: list[Any] = [(first, same) for first in ("begin", "overwrite", "go on", "add")]
SLOW = [("begin", command) for command in (overwrite, new_file, another_model)]
SLOW += [("overwrite", new_file), ("go on", new_file), ("add", overwrite)]
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
                world.more[0].rename(world.more[1])
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
