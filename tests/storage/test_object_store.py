"""Conditional writes and leases, against a server of each kind; file systems keep their options and retries."""

import pickle
import time
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import S3FileSystem

from mnistsum_ray.errors import ExistingFileError, RequestError, RunError, StorageError, TryAgainError
from mnistsum_ray.storage import lock, object_store
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.object_store import RetryingS3FileSystem, options_of
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable

GIVEN = {"region": "eu-west-1", "scheme": "http", "endpoint_override": "127.0.0.1:9"}
S3 = "s3://bucket/a?region=eu-west-1&endpoint_override=127.0.0.1:9&scheme=http"


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.3)
    monkeypatch.setattr(lock, "LEASE_TTL_SECONDS", 1.8)


def test_of_two_conditional_writes_one_is_refused(bucket: Location) -> None:
    filesystem, path = bucket.filesystem, f"{bucket.path}/a/a key"
    first = object_store.put(filesystem, path, b"1")
    with pytest.raises(ExistingFileError):
        object_store.put(filesystem, path, b"2")
    second = object_store.put(filesystem, path, b"3", first)
    with pytest.raises(ExistingFileError):
        object_store.put(filesystem, path, b"4", first)
    assert object_store.get(filesystem, path) == (b"3", second)
    assert object_store.get(filesystem, f"{bucket.path}/none") is None
    with pytest.raises(StorageError):
        object_store.put(filesystem, f"{bucket.path}/none", b"5", first)


def test_files_are_created_and_deleted_also_from_another_process(bucket: Location) -> None:
    there = pickle.loads(pickle.dumps(writable(bucket.with_retries() / "deep")))
    there.create("file", pa.py_buffer(b"1"))
    with pytest.raises(ExistingFileError):
        there.create("file", pa.py_buffer(b"2"))
    assert (bucket / "deep" / "file").read_bytes() == b"1"
    there.write("file", b"3")
    assert (bucket / "deep" / "file").read_bytes() == b"3"
    deleted: list[int] = []
    writable(bucket).delete_files(["never/there", "deep/file"], deleted.append)
    assert deleted == [2]
    assert (bucket / "deep").files() == []


@pytest.mark.usefixtures("short_lease")
def test_one_run_holds_a_folder_until_it_ends(bucket: Location) -> None:
    folder = bucket / "held"
    with folder_lock(folder, "--output", print) as held:
        assert held.lock
        with (
            pytest.raises(TryAgainError, match=rf"another run \({held.lock.holder}\) is writing there"),
            folder_lock(folder, "--output", print),
        ):
            pass
        there = pickle.loads(pickle.dumps(held))  # as its workers have it
        time.sleep(lock.LEASE_TTL_SECONDS)
        for side in (held, there):
            side.check()
    assert not (folder / "_lock").exists()


@pytest.mark.usefixtures("short_lease")
def test_a_lease_that_is_no_longer_renewed_is_taken_over_and_its_run_notices(bucket: Location) -> None:
    folder, said = bucket / "left", list[str]()
    writable(folder).write("_lock", {"id": "a run that was killed", "beat": 7})
    with folder_lock(folder, "--output", said.append) as held:
        assert "was left by a run that no longer renews it (a run that was killed)" in said[-1]
        held.check()
        writable(folder).write("_lock", {"id": "a run that took it", "beat": 1})
        time.sleep(lock._CHECK_SECONDS)
        with pytest.raises(RunError, match=r"another run has taken the output \(a run that took it\)"):
            held.check()
    assert (folder / "_lock").exists(), "it belongs to the run that took it"


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_store_that_ignores_conditions_is_refused(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    def unconditional(_: Any, path: str, data: bytes, __: Any = None) -> Any:
        folder, _, name = path.rpartition("/")
        writable(bucket.at(folder)).write(name, data)
        return {"e_tag": "1"}

    monkeypatch.setattr(object_store, "put", unconditional)
    with pytest.raises(RequestError, match="ignores the condition"), folder_lock(bucket / "old", "--output", print):
        pass
    assert not (bucket / "old" / "_lock").exists()


def test_an_s3_file_system_keeps_its_options_and_its_retries_in_another_process() -> None:
    plain = locate(S3, "--output")
    there = pickle.loads(pickle.dumps(plain.with_retries()))
    assert type(there.filesystem) is RetryingS3FileSystem
    assert there == plain.with_retries()
    for filesystem in (plain.filesystem, there.filesystem):
        options = options_of(filesystem)
        assert options.items() >= GIVEN.items(), "pyarrow: __reduce__ no longer gives the constructor's options"
        assert S3FileSystem(**options).equals(plain.filesystem)
