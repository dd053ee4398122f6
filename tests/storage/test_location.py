"""A file appears whole or not at all, and a folder lists its own files."""

from pathlib import Path

import pytest

from mnistsum_ray.storage.paths import locate


def test_json_is_read_as_written(tmp_path: Path) -> None:
    place = locate(str(tmp_path), "--storage-path") / "a" / "b.json"
    assert not place.exists()
    place.write_json({"x": [1, 2]})
    assert place.read_json() == {"x": [1, 2]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"], "no unfinished file is left beside it"


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    place = locate(str(tmp_path), "--output") / ("x" * 255)
    place.write_bytes(b"whole")
    assert place.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_files_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert [info.base_name for info in locate(str(tmp_path / "in"), "--output").files()] == ["a"]


def test_json_that_is_nested_without_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        locate(str(tmp_path / "a.json"), "--output").read_json()
