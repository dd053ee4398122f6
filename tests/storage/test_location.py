"""A file appears whole or not at all, and a folder lists its own files."""

from pathlib import Path

from mnistsum_ray.storage.paths import locate
from tests.conftest import writable


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    writable(tmp_path).write("x" * 255, b"whole")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255], "no unfinished file is left beside it"


def test_files_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert [entry.name for entry in locate(str(tmp_path / "in"), "--output").files()] == ["a"]
