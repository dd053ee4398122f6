"""Paths and URIs lead where a person thinks they do."""

from pathlib import Path

import pytest

from mnistsum_ray.config import Refusal
from mnistsum_ray.storage import base_folder, locate


def test_relative_paths_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs", "--storage-path").text == str(tmp_path / "runs")
    assert locate("runs/../other", "--storage-path").text == str(tmp_path / "other")


def test_a_submitted_job_does_not_write_into_its_temporary_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_folder() == tmp_path / "home"


def test_files_come_back(tmp_path: Path) -> None:
    place = locate(str(tmp_path), "--storage-path") / "a" / "b.json"
    assert not place.exists()
    place.write_json({"x": [1, 2]})
    assert place.read_json() == {"x": [1, 2]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"], "nothing partial is left beside it"


def test_a_uri_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(Refusal, match="--data nonsense://x"):
        locate("nonsense://x", "--data")
