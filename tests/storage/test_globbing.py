"""A glob matches as in a shell, and reads no folder that cannot hold a match."""

import os
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.storage.globbing import list_glob, matches
from mnistsum_ray.storage.paths import locate
from tests.storage.test_listing import files, fill


def test_a_glob_looks_only_where_it_can_match(tmp_path: Path) -> None:
    """As a shell does, links in its way included."""
    root = fill(tmp_path / "in", "a/x.parquet", "b/deep/down/y.parquet", "c/z.txt")
    (root / "a" / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")

    def found(*pattern: str) -> list[str]:
        return files(list_glob(locate(str(root), "--input"), pattern), root)

    assert found("*", "x.parquet") == ["a/x.parquet"]
    assert found("*", "*", "*", "*.parquet") == ["a/loop/a/x.parquet", "b/deep/down/y.parquet"]
    assert found("**", "*.parquet") == ["a/x.parquet", "b/deep/down/y.parquet"]
    assert found("**") == ["a/x.parquet", "b/deep/down/y.parquet", "c/z.txt"]
    assert found("[bc]", "*") == ["c/z.txt"]
    assert found("nothing*") == []


def test_a_glob_at_the_root_of_the_disk_ends_at_once() -> None:
    """Listing all below it would walk the disk, and /proc."""
    listing = list_glob(locate("/", "--input"), ("*", "nobody-has-such-a-file"))
    assert listing.files == {}


def test_a_wildcard_matches_no_leading_dot_wherever_files_lie() -> None:
    assert matches(("a", "b", "c.parquet"), ("**", "*.parquet"))
    assert not matches((".tmp", "c.parquet"), ("**", "*.parquet"))
    assert not matches(("a", ".c.parquet"), ("**",))
    assert matches((".tmp", "c.parquet"), (".tmp", "**"))


def test_a_folder_that_cannot_be_read_costs_just_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "in", "a/closed/x.parquet", "a/open/y.parquet")
    scandir = os.scandir

    def closed(folder: str) -> Any:
        if folder.endswith("/closed"):
            raise PermissionError
        return scandir(folder)

    monkeypatch.setattr("os.scandir", closed)  # root may read all
    listing = list_glob(locate(str(root), "--input"), ("**", "*.parquet"))
    assert files(listing, root) == ["a/open/y.parquet"]
    assert listing.skipped == {str(root / "a" / "closed"): "a folder that cannot be read"}
