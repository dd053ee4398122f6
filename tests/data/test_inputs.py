"""`--input`: which files it names, under which names, and which are skipped; a glob reads no folder without a match."""

import os
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.data.inputs import Inputs, list_inputs, matches
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import is_hidden
from mnistsum_ray.storage.paths import locate

NAMES = ("a.parquet", "b/c.parquet", "b/d.PQ", "b/e/f.parq", "b/g,h [1].parquet")
SKIPPED = ("notes.txt", "_SUCCESS", ".hidden.parquet", "b/_temporary/x.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in (*NAMES, *SKIPPED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    return root


def find(*texts: object, output: Path = Path("/nowhere/out")) -> Inputs:
    return list_inputs(tuple(map(str, texts)), locate(str(output), "--output"))


def names(inputs: Inputs) -> list[str]:
    found: list[str] = inputs.files["name"].to_pylist()
    return found


def test_a_folder_is_listed_with_all_below_it_and_other_files_are_skipped(folder: Path) -> None:
    inputs = find(folder)
    assert names(inputs) == sorted(NAMES)
    assert inputs.root.path == str(folder)
    skipped = {name.replace("_temporary/x.parquet", "_temporary") for name in SKIPPED}
    assert set(inputs.skipped) == {str(folder / name) for name in skipped}
    for name, size, modified in zip(*inputs.files.to_pydict().values(), strict=True):
        assert (size, modified) == (len(name), (folder / name).stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet"]),
        ("*/*.parquet", ["c.parquet", "g,h [1].parquet"]),
        ("*/*/*.parq", ["f.parq"]),
        ("**/*.parq*", ["a.parquet", "b/c.parquet", "b/e/f.parq", "b/g,h [1].parquet"]),
        ("b/?.p[a-z]*", ["c.parquet"]),
    ],
)
def test_globs_match_as_a_shell_does(folder: Path, pattern: str, expected: list[str]) -> None:
    assert [Path(name).name for name in names(find(folder / pattern))] == [Path(name).name for name in expected]


def test_a_wildcard_matches_no_hidden_name() -> None:
    assert matches(("a", "b", "c.parquet"), ("**", "*.parquet"))
    assert not matches((".tmp", "c.parquet"), ("**", "*.parquet"))
    assert not matches(("_temporary", "c.parquet"), ("*", "*.parquet"))
    assert not matches(("a", ".c.parquet"), ("**",))
    assert matches((".tmp", "c.parquet"), (".tmp", "**"))
    hidden = {"a/b.parquet": False, "a/_b": True, ".ipynb_checkpoints/a": True, "a_/b._c": False}
    assert {name: is_hidden(name) for name in hidden} == hidden


def test_a_glob_looks_only_where_it_can_match(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="there is no Parquet file"):
        find("/*/nobody-has-such-a-file")  # without a walk over the disk, and /proc
    scandir, opened = os.scandir, []

    def noted(place: str) -> Any:
        opened.append(place)
        return scandir(place)

    monkeypatch.setattr("os.scandir", noted)
    assert names(find(folder / "*" / "c.parquet")) == ["b/c.parquet"]
    assert str(folder / "b" / "e") not in opened


def test_a_file_may_have_any_name_and_several_values_share_one_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(find(folder / "notes.txt")) == ["notes.txt"]
    assert names(find(folder / "b/g,h [1].parquet")) == ["g,h [1].parquet"]
    both = find(folder / "b/e", folder / "a.parquet", folder / "b/e/f.parq")
    assert names(both) == ["a.parquet", "b/e/f.parq"]
    assert both.root.path == str(folder)
    monkeypatch.chdir(folder / "b")
    expected = ["c.parquet", "d.PQ", "e/f.parq", "g,h [1].parquet"]
    assert names(find("_temporary/..")) == names(find("../b", "e/../c.parquet")) == expected


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=rf"--input {folder}/missing: there is no such file or folder \({folder}/missing\)"):
        find(folder / "missing")
    (folder / "c").mkdir()
    (folder / "c" / "rows.csv").write_text("1")
    with pytest.raises(RequestError, match=r"there is no Parquet file .*\.pq, \.parq\) .*rows\.csv"):
        find(folder / "c")


@pytest.mark.parametrize(
    ("text", "output", "message"),
    [
        (".", "out", "lies in the input"),
        ("b", ".", "holds the input file"),
        ("**/*.parquet", "out/deep", "lies in the input"),
        ("*/*.parquet", "out/deep", None),
        ("a.parquet", "b/out", None),
    ],
)
def test_an_output_inside_the_input_and_an_input_inside_the_output_are_refused(
    folder: Path, tmp_path: Path, text: str, output: str, message: str | None
) -> None:
    (tmp_path / "link").symlink_to(folder)
    for place, other in ((folder, folder), (folder, tmp_path / "link"), (tmp_path / "link", folder)):
        if message is None:
            assert names(find(place / text, output=other / output))
        else:
            with pytest.raises(RequestError, match=message):
                find(place / text, output=other / output)


def test_links_to_files_are_followed_and_links_to_folders_only_if_they_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.parquet").write_bytes(b"z")
    links = {
        "b/up": folder,
        "more": tmp_path / "elsewhere",
        "latest.parquet": folder / "a.parquet",
        "one.parquet": tmp_path / "elsewhere" / "z.parquet",
        "gone.parquet": tmp_path / "nowhere",
        "self": folder / "self",
        "zero.parquet": Path("/dev/zero"),
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.parquet")
    expected = {
        "b/up": "a link to a folder",
        "more": "a link to a folder",
        "latest.parquet": "a link to a file that is listed anyway",
        "gone.parquet": "a link that leads nowhere",
        "zero.parquet": "a device, a pipe or a socket",
        "pipe.parquet": "a device, a pipe or a socket",
    }
    for value in (folder, folder / "**" / "*.p*"):
        inputs = find(value)
        assert {*names(inputs)} >= {"a.parquet", "one.parquet", "b/e/f.parq"}
        assert expected.items() <= {os.path.relpath(path, folder): why for path, why in inputs.skipped.items()}.items()
    assert names(find(folder)) == sorted([*NAMES, "one.parquet"])
    assert names(find(folder / "more")) == ["z.parquet"]
    assert names(find(folder / "latest.parquet")) == ["a.parquet"]
    for name in ("pipe.parquet", "zero.parquet"):
        with pytest.raises(RequestError, match="is a device, a pipe or a socket"):
            find(folder / name)


def test_a_file_whose_name_is_not_utf8_is_unusable(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.parquet")).write_bytes(b"x")
    inputs = find(folder)
    assert inputs.unusable == {"caf\\udce9.parquet": "its name is not UTF-8; rename it"}
    assert names(inputs) == sorted([*NAMES, "caf\\udce9.parquet"])
