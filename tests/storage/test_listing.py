"""Each file is listed once, whatever links lead to it."""

import os
from pathlib import Path

from mnistsum_ray.storage.listing import Listing, escape_non_utf8, list_folder, report_skipped
from mnistsum_ray.storage.paths import locate


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def below(root: Path) -> Listing:
    return list_folder(locate(str(root), "--input"))


def files(listing: Listing, root: Path) -> list[str]:
    second = set(listing.duplicates())
    return sorted(os.path.relpath(path, root) for path in listing.files if path not in second)


def test_a_link_to_a_parent_lists_nothing_twice(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "a.parquet", "b/c.parquet")
    (root / "b" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "above").symlink_to(tmp_path)
    listing = below(root)
    assert files(listing, root) == ["a.parquet", "b/c.parquet"]
    assert set(listing.skipped) == {str(root / name) for name in ("b/up", "self", "above")}


def test_a_link_to_a_hidden_folder_is_followed(tmp_path: Path) -> None:
    """As `current -> .releases/5` is published in one step."""
    root = fill(tmp_path / "in", ".releases/5/a.parquet", ".releases/4/a.parquet", "_v3/b.parquet", "other.parquet")
    (root / "current").symlink_to(".releases/5")
    (root / "latest").symlink_to("_v3")
    listing = below(root)
    assert files(listing, root) == ["current/a.parquet", "latest/b.parquet", "other.parquet"]
    assert set(listing.skipped) == {str(root / ".releases"), str(root / "_v3")}


def test_two_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "a/x.parquet", "b/y.parquet")
    (root / "a" / "b").symlink_to(root / "b")
    (root / "b" / "a").symlink_to(root / "a")
    assert files(below(root), root) == ["a/x.parquet", "b/y.parquet"]


def test_a_link_to_a_neighbour_is_skipped_and_one_that_leads_away_is_followed(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "2024/a.parquet", "2025/b.parquet")
    fill(tmp_path / "elsewhere", "c.parquet", "deep/d.parquet")
    (root / "latest").symlink_to(root / "2025")
    (root / "latest.parquet").symlink_to(root / "2025" / "b.parquet")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "one.parquet").symlink_to(fill(tmp_path, "single.parquet") / "single.parquet")
    (root / "gone.parquet").symlink_to(tmp_path / "nowhere")
    listing = below(root)
    expected = ["2024/a.parquet", "2025/b.parquet", "again/c.parquet", "again/deep/d.parquet", "one.parquet"]
    assert files(listing, root) == expected
    assert listing.duplicates() == [str(root / "latest.parquet")]
    assert {os.path.relpath(path, root): why for path, why in listing.skipped.items()} == {
        "latest": "a link to a file or folder that is listed anyway",
        "more": "a link to a file or folder that is listed anyway",
        "gone.parquet": "a link that leads nowhere",
    }
    leads = {"again": "elsewhere", "gone.parquet": "nowhere"}
    assert listing.links == {str(root / link): str(tmp_path / real) for link, real in leads.items()}


def test_what_is_no_file_is_skipped(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "a.parquet")
    os.mkfifo(root / "pipe.parquet")
    listing = below(root)
    assert files(listing, root) == ["a.parquet"]
    assert listing.skipped == {str(root / "pipe.parquet"): "neither a file nor a folder"}


def test_a_name_that_is_not_utf8_is_listed_without_its_info(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "a.parquet")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.parquet")).write_text("")
    listing = below(root)
    assert len(listing.files) == 2
    assert list(listing.file_infos(locate(str(root), "--input"))) == [str(root / "a.parquet")]
    assert sorted(escape_non_utf8(path) for path in listing.files)[1] == f"{root}/caf\\udce9.parquet"


def test_each_reason_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    report_skipped({"/in/b": "its name", "/in/a": "its name", "/in/c": "a link that leads nowhere"}, said.append)
    assert said == [
        "left out for their names: 2, such as /in/a",
        "left out since each is a link that leads nowhere: 1, such as /in/c",
    ]
