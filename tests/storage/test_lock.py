"""One run at a time holds a folder, on a disk as in a store of each kind."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from mnistsum_ray.errors import RequestError, RunError, TryAgainError
from mnistsum_ray.storage import lock
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.5)
    monkeypatch.setattr(lock, "EXPIRED_SECONDS", 4.0)  # a store's clock has whole seconds


def refused(folder: Location, said: str) -> None:
    with pytest.raises(TryAgainError, match=said), folder_lock(folder, "--name", print):
        pass


def test_one_run_holds_a_folder_until_it_ends(bucket: Location) -> None:
    folder = bucket / "held"
    with folder_lock(folder, "--name", print) as held:
        if not bucket.is_local:
            time.sleep(lock.EXPIRED_SECONDS + 1)  # a thread renews the lock
        refused(folder, rf"^--name .*held.*: another run \({held.holder}\) is writing there; wait")
        held.check()
    with folder_lock(folder, "--name", pytest.fail) as held:
        (folder / "_lock").write(b"a-run-that-took-it")
        if not bucket.is_local:
            time.sleep(2 * lock.RENEW_SECONDS)
        said = r"another run has taken the output \(a-run-that-took-it\); this run stops"
        with pytest.raises(RunError, match=said):
            held.check()
    assert b"a-run-that-took-it" in (folder / "_lock").read_bytes(), "it belongs to the other run"


@pytest.mark.parametrize("bucket", ["s3", "azure"], indirect=True)
def test_a_lock_is_taken_over_by_one_run_once_it_is_old_by_the_clock_of_the_store(
    bucket: Location,
) -> None:
    """S3's is an hour slow here: by this machine's the lock was old when it was written."""
    folder, said, tried = bucket / "left", list[str](), Barrier(4, timeout=60)
    (folder / "_lock").write(b"a-killed-run 1234")
    refused(
        folder,
        r"another run \(a-killed-run\) .*; if it was killed, this command takes over in [34] s",
    )
    time.sleep(lock.EXPIRED_SECONDS + 1)

    def take(_: int) -> tuple[bool, str]:
        try:
            with folder_lock(folder, "--name", said.append) as held:
                tried.wait()
                held.check()
                return True, held.holder
        except TryAgainError as error:
            tried.wait()
            return False, str(error)

    with ThreadPoolExecutor(4) as runs:
        results = list(runs.map(take, range(4)))
    (holder,) = [text for took, text in results if took]
    refusals = [text for took, text in results if not took]
    assert all(f"another run ({holder}) is writing there" in text for text in refusals)
    assert "a-killed-run no longer renews it; taking it over" in said[0]
    assert folder.files() == []


def test_a_folder_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"^--name /etc/passwd/\S+: cannot be written: Not a directory"
    ):
        folder_lock(locate("/etc/passwd/out", "--name"), "--name", print).__enter__()
