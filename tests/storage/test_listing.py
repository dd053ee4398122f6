"""Each file is listed once, whatever links lead to it; a glob matches as in a shell, and reads no folder without a match."""

import os
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.storage.listing import (
    Listing,
    duplicate_paths,
    is_hidden,
    list_folder,
    matches,
    report_skipped,
)
from mnistsum_ray.storage.paths import locate


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def files(listing: Listing, root: Path) -> list[str]:
    second = set(duplicate_paths(listing.files))
    return sorted(os.path.relpath(path, root) for path in listing.files if path not in second)


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "2024/a.parquet", "2025/b.parquet", ".old/x.parquet")
    (root / "2025" / "up").symlink_to(root)
    (root / "latest").symlink_to(root / "2025")
    (root / "hidden").symlink_to(root / ".old")
    (root / "latest.parquet").symlink_to(root / "2025" / "b.parquet")
    (root / "one.parquet").symlink_to(fill(tmp_path, "single.parquet") / "single.parquet")
    (root / "gone.parquet").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    listing = list_folder(locate(str(root), "--input"))
    assert files(listing, root) == ["2024/a.parquet", "2025/b.parquet", "one.parquet"]
    assert duplicate_paths(listing.files) == [str(root / "latest.parquet")]
    assert {os.path.relpath(path, root): why for path, why in listing.skipped.items()} == {
        "2025/up": "a link to a folder",
        "latest": "a link to a folder",
        "hidden": "a link to a folder",
        ".old": "its name",
        "gone.parquet": "a link that leads nowhere",
        "self": "a link that leads nowhere",
    }


def test_each_reason_is_said_once() -> None:
    said: list[str] = []
    report_skipped({"/in/b": "its name", "/in/a": "its name", "/in/c": "a link that leads nowhere"}, said.append)
    assert said == [
        "left out for their names: 2, such as /in/a",
        "left out since each is a link that leads nowhere: 1, such as /in/c",
    ]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("a/b.parquet", False), ("a/_b", True), (".ipynb_checkpoints/a", True), ("a/_x/b", True), ("a_/b._c", False)],
)
def test_a_name_is_hidden_by_any_of_its_components(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_a_glob_looks_only_where_it_can_match(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "a/x.parquet", "b/deep/down/y.parquet", "c/z.txt")
    (root / "a" / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")

    def found(*pattern: str) -> list[str]:
        return files(list_folder(locate(str(root), "--input"), pattern), root)

    assert found("*", "x.parquet") == ["a/x.parquet"]
    assert found("*", "*", "*", "*.parquet") == ["b/deep/down/y.parquet"]
    assert found("**", "*.parquet") == ["a/x.parquet", "b/deep/down/y.parquet"]
    assert found("**") == ["a/x.parquet", "b/deep/down/y.parquet", "c/z.txt"]
    assert found("[bc]", "*") == ["c/z.txt"]
    assert found("nothing*") == []
    assert list_folder(locate("/", "--input"), ("*", "nobody-has-such-a-file")).files == {}, (
        "this does not walk the disk, and /proc"
    )


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
    listing = list_folder(locate(str(root), "--input"), ("**", "*.parquet"))
    assert files(listing, root) == ["a/open/y.parquet"]
    assert listing.skipped == {str(root / "a" / "closed"): "a folder that cannot be read"}
