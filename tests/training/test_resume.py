"""Which checkpoint a resumed run continues from."""

from pathlib import Path

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.resume import latest_valid_checkpoint
from mnistsum_ray.training.state import STATE_CARD


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(locate(str(tmp_path), "--name"), print) is None


def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "epoch_00029"
    folder.mkdir()
    (folder / STATE_CARD).write_text('{"format": "mnistsum_ray.trainer/99"}')
    with pytest.raises(RequestError, match=r"epoch_00029 cannot be used: it was written by another version"):
        latest_valid_checkpoint(locate(str(tmp_path), "--name"), print)
    assert folder.exists()
