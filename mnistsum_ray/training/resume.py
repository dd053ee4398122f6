"""What `--resume` starts from: the newest complete checkpoint of the run folder, and the stored manifest."""

import re
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileType

from mnistsum_ray.data.parquet_files import ParquetFiles
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.artifacts import DATA_FILES
from mnistsum_ray.training.state import CheckpointError, CheckpointVersionError, verify_checkpoint

_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Ray Train rewrites it in place, so a kill at that moment leaves it incomplete, and then
a restored run fails for good. So this program does not use it."""

_CHECKPOINT: Final = re.compile(r"epoch_(\d+)(?:_(step)_(\d+)|_(sum_head))?")


def latest_valid_checkpoint(folder: Location, say: Callable[[str], None]) -> Location | None:
    """Newest complete checkpoint of a run, or None; each newer one that is damaged gets a console line.

    Raises:
        RequestError: the newest complete checkpoint is of another version.
    """
    found: dict[tuple[int, int, int], str] = {}
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        match = _CHECKPOINT.fullmatch(info.base_name)
        if match and info.type == FileType.Directory:
            epoch = int(match[1])
            # A checkpoint within an epoch has the number of that epoch, and is older than the one at its end.
            order = (epoch - 1, 1, int(match[3])) if match[2] else (epoch, 0, int(bool(match[4])))
            found[order] = info.base_name
    for order in sorted(found, reverse=True):
        checkpoint = folder / found[order]
        try:
            verify_checkpoint(checkpoint)
        except CheckpointVersionError as error:
            raise RequestError(
                f"--resume: checkpoint {checkpoint.display} cannot be used: {error}; resume with that version"
            ) from None
        except CheckpointError as error:
            say(f"checkpoint {checkpoint.display} cannot be used: {error}")
            continue
        return checkpoint
    return None


def delete_other_checkpoints(folder: Location, start: Location | None) -> None:
    """Delete all checkpoints of the run except the one that it resumes from, and Ray Train's list of them."""
    (folder / _SNAPSHOT).delete()
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        if _CHECKPOINT.fullmatch(info.base_name) and (start is None or info.path != start.path):
            folder.filesystem.delete_dir(info.path)


def check_data_files(folder: Location, files: ParquetFiles, *, same_place: bool) -> None:
    """Check that the files of a streamed run are those that it began with.

    Raises:
        RequestError: a file has changed, is missing or is new; names it.
    """
    try:
        data = (folder / DATA_FILES).read_bytes()
    except FileNotFoundError:  # the run was killed before it had written them, and has trained on nothing yet
        return
    try:
        earlier = pq.read_table(pa.BufferReader(data))
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"--resume: {(folder / DATA_FILES).display} cannot be read: {one_line(error)}; start another run"
        ) from None
    changed = files.changed_file(earlier, same_place=same_place)
    if changed:
        raise RequestError(f"--resume: {changed}; put it back as it was, with its time, or start another run")


def resume_manifest(stored: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a resumed run: results of the stored one stay until there are new ones.

    Raises:
        RequestError: the run was trained on other data.
    """
    data, stored_data = manifest["data"], stored["data"]
    if stored_data["sha256"] != data["sha256"]:
        raise RequestError(
            f"--resume: the data are not those of the run (SHA-256 {data['sha256'][:12]}…, the run has "
            f"{stored_data['sha256'][:12]}… from {stored_data['location']}); name the same data, or start another run"
        )
    # The stored config names the data that `--data auto` found, so only the first manifest says that it is not full MNIST.
    return stored | manifest | {"data": data | {"notice": data["notice"] or stored_data["notice"]}}
