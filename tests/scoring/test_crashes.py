"""A crash at every operation on the storage, and then the same command again, or --overwrite.

The driver, the worker and the files are real; the n-th write, create or delete crashes before it is
done (which is after the one before), or fails. What is there is read with pyarrow alone.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError, RunError, StorageError
from mnistsum_ray.scoring.parts import PART_KEY
from mnistsum_ray.storage.store import Location
from tests.scoring.conftest import TIMED, Example, write_rows

OPERATIONS = ("write", "create", "delete_files")


class Crash(BaseException):
    """The process ends here: nobody handles it."""


class Store:
    """Counts the operations that change the storage; the n-th one goes wrong, none if n is 0."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = self.n = 0
        self.how = ""
        # A tenth of the time; test_store.py looks for it.
        patch.setattr(os, "fsync", lambda _: None)
        for name in OPERATIONS:
            patch.setattr(Location, name, self._faulty(getattr(Location, name)))

    def fail_at(self, n: int, how: str) -> None:
        """Count from now on; `how` is what `score` will return."""
        self.count, self.n, self.how = 0, n, how

    def _faulty(self, operation: Callable[..., None]) -> Callable[..., None]:
        def call(place: Location, argument: Any) -> None:
            self.count += 1
            if self.count != self.n:
                operation(place, argument)
                return
            if self.how == "failed":
                raise StorageError(f"{place.display}: cannot be written: no space left on device")
            if operation.__name__ == "delete_files":  # of many files some are gone
                operation(place, argument[: len(argument) // 2])
            raise Crash

        return call


def score(example: Example, **settings: Any) -> str:
    """Score; how it ended."""
    try:
        example.score(**settings)
    except (RequestError, RunError, StorageError):
        return "failed"
    except Crash:
        return "crashed"
    finally:
        check(example)
    assert "manifest.json" in example.files()
    return "done"


def check(example: Example) -> None:
    """Each file is whole and of one request; with a manifest each row is there once."""
    files = example.files()
    assert files[".notes"] == b"of another program"
    rows: dict[str, list[int]] = {}
    requests = set()
    for path in sorted((example.output / "predictions").rglob("[!.]*.p*q*")):
        table = pq.read_table(path)
        footer = json.loads(pq.read_metadata(path).metadata[PART_KEY])
        requests.add(footer["run"])
        assert table["reason"].is_null().equals(table["pred_sum"].is_valid())
        rows.setdefault(footer["part"]["input"], []).extend(table["id"].to_pylist())
    assert len(requests) <= 1
    every = list(itertools.chain(*rows.values()))
    assert len(every) == len(set(every))
    if "manifest.json" in files:
        assert {"run.json", "report.html"} <= files.keys()
        listed = pq.read_table(example.output / "files.parquet").to_pylist()
        assert rows.keys() == {row["file"] for row in listed if row["status"] == "scored"}
        for name, ids in rows.items():
            # That of an earlier run is of the input as it was then.
            then = example.folder / name.removeprefix("deep/")
            known = [path for path in (example.input / name, then) if path.exists()]
            assert ids in [pq.read_table(path)["id"].to_pylist() for path in known]


LONG = ("go on", "overwrite", "add", "change")

FIRST = ["begin", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


@pytest.mark.parametrize("first", FIRST)
def test_a_crash_at_any_operation_loses_and_repeats_nothing(
    first: str, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first run, one with --overwrite, one that goes on, and one with new or changed rows."""
    store = Store(monkeypatch)
    (example.input / "deep" / "b.pq").rename(example.folder / "b.pq")
    write_rows(example.folder / "more.parquet", [20, 21])
    timed = (*TIMED, "run.json", ".notes")
    begin(example)
    change_input(example, first)
    assert score(example) == "done"
    undisturbed = example.files(*timed)
    for how in ("crashed", "failed"):
        for n in itertools.count(1):
            begin(example)
            if first in ("overwrite", "add", "change"):
                score(example)
            change_input(example, first)
            if first == "go on":
                store.fail_at(5, "crashed")
                assert score(example) == "crashed"
            store.fail_at(n, how)
            ended = score(example, overwrite=first == "overwrite")
            crashed = store.count >= n
            store.fail_at(0, "")
            assert ended == (how if crashed else "done")
            assert score(example) == "done"
            assert example.files(*timed) == undisturbed
            if not crashed:
                break
        assert n > 5, "each of these runs changes the storage at least five times"


def begin(example: Example) -> None:
    """An empty output but for a file of another program; and the four input files."""
    (example.input / "more.parquet").unlink(missing_ok=True)
    (example.input / "deep" / "b.pq").unlink(missing_ok=True)
    os.link(example.folder / "b.pq", example.input / "deep" / "b.pq")
    shutil.rmtree(example.output, ignore_errors=True)
    example.output.mkdir()
    (example.output / ".notes").write_text("of another program")


def change_input(example: Example, first: str) -> None:
    """Add a file or replace one, by links, so that its ETag is the same each time."""
    if first == "add":
        os.link(example.folder / "more.parquet", example.input / "more.parquet")
    if first == "change":
        (example.input / "deep" / "b.pq").unlink()
        os.link(example.folder / "more.parquet", example.input / "deep" / "b.pq")
