"""A crash at every operation on the storage, and then each of the commands that a user may give.

The driver, the worker and the files are real; the n-th write, create or delete crashes before it is
done, after it, or fails. What is there is read with pyarrow alone.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError, RunError, StorageError
from mnistsum_ray.storage.store import Location
from tests.conftest import write_model
from tests.scoring.conftest import TIMED, World, write_rows

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


def score(world: World, **settings: Any) -> str:
    """Score; how it ended. A refusal must change nothing."""
    before = world.files()
    try:
        world.score(**settings)
    except RequestError:
        assert world.files() == before
        return "refused"
    except (RunError, StorageError):
        return "failed"
    except Crash:
        return "crashed"
    finally:
        check(world)
    assert "manifest.json" in world.files()
    return "done"


def check(world: World) -> None:
    """Each file is whole and of one request; with a manifest each row is there once."""
    files = world.files()
    assert files[".notes"] == b"of another program"
    rows: dict[str, list[int]] = {}
    requests = set()
    for path in sorted((world.output / "predictions").rglob("[!.]*.p*q*")):
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
        listed = pq.read_table(world.output / "files.parquet").to_pylist()
        assert rows.keys() == {row["file"] for row in listed if row["status"] == "scored"}
        for name, ids in rows.items():
            assert ids == pq.read_table(world.input / name)["id"].to_pylist()


def same(world: World) -> None:
    pass


def overwrite(world: World) -> None:
    assert score(world, overwrite=True) == "done"


def another_model(world: World) -> None:
    model = str(write_model(world.folder / "other", 1))
    if score(world, model=model) == "done":  # nothing had begun
        assert score(world) == "refused"
        assert score(world, overwrite=True) == "done"


def add_file(world: World) -> None:
    (world.folder / "more.parquet").rename(world.input / "more.parquet")


def new_file(world: World) -> None:
    add_file(world)
    assert score(world) == "done"


CASES: list[Any] = [(first, same) for first in ("begin", "overwrite", "go on", "add")]
SLOW = [("begin", command) for command in (overwrite, new_file, another_model)]
SLOW += [("overwrite", new_file), ("go on", new_file), ("add", overwrite)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("first", "command"), CASES)
def test_a_crash_at_any_operation_loses_and_repeats_nothing(
    first: str, command: Callable[[World], None], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first run, one with --overwrite, one that goes on, and one that finds a new file."""
    store = Store(monkeypatch)
    write_rows(world.input / "more.parquet", [20, 21])
    timed = (*TIMED, "run.json", ".notes")
    begin(world)
    if first == "add" or command is new_file:
        add_file(world)
    assert score(world) == "done"
    undisturbed = world.files(*timed)
    hit = 0
    for how in ("crashes before", "crashes after", "fails"):
        for n in itertools.count(1):
            begin(world)
            if first in ("overwrite", "add"):
                score(world)
            if first == "add":
                add_file(world)
            if first == "go on":
                store.left, store.how = 4, "crashes after"
                assert score(world) == "crashed"
            store.left, store.how = n, how
            ended = score(world, overwrite=first == "overwrite")
            is_over = store.left > 0
            store.left = -1
            assert ended == ("done" if is_over else "failed" if how == "fails" else "crashed")
            command(world)
            assert score(world) == "done"
            assert world.files(*timed) == undisturbed
            if is_over:
                break
            hit += 1
    assert hit >= 3 * 4


def begin(world: World) -> None:
    """An empty output but for a file of another program; and the four input files."""
    with suppress(FileNotFoundError):
        (world.input / "more.parquet").rename(world.folder / "more.parquet")
    shutil.rmtree(world.output, ignore_errors=True)
    world.output.mkdir()
    (world.output / ".notes").write_text("of another program")
