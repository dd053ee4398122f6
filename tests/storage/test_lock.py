"""One run at a time holds a folder on a disk."""

from pathlib import Path

import pytest

from mnistsum_ray.errors import RequestError, TryAgainError
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import folder_lock, locate


def test_one_run_holds_a_folder_until_it_ends(tmp_path: Path) -> None:
    folder = locate(str(tmp_path / "deep" / "held"), "--name")
    said = r"^--name /.*/held: another run \(\S+:\d+\) is writing there; wait for it, or choose"
    for _ in range(2):
        with (
            folder_lock(folder, "--name"),
            pytest.raises(TryAgainError, match=said),
            folder_lock(folder, "--name"),
        ):
            pass


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_folder_in_a_store_is_held_by_nobody(bucket: Location) -> None:
    with folder_lock(bucket / "held", "--name"), folder_lock(bucket / "held", "--name"):
        assert (bucket / "held").files() == []


def test_a_folder_that_cannot_be_held_is_refused() -> None:
    said = r"^--name /etc/passwd/\S+: cannot be written: Not a directory"
    with (
        pytest.raises(RequestError, match=said),
        folder_lock(locate("/etc/passwd/out", "--name"), "--name"),
    ):
        pass
