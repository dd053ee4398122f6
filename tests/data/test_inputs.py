"""`--input`: which files it names, under which names, and which are left out."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.data.inputs import Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import ask, serve_s3

NAMES = ("a.parquet", "b/c.parquet", "b/d.PQ", "b/e/f.parq", "b/g,h [1].parquet")
SKIPPED = (".hidden.parquet", "_SUCCESS", "b/_temporary/x.parquet", "notes.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in (*NAMES, *SKIPPED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    (root / "b" / "up").symlink_to(root)  # perhaps into a circle
    (tmp_path / "link").symlink_to(root)
    return root


def find(*texts: object, output: Path = Path("/nowhere/out")) -> Inputs:
    return list_inputs(tuple(map(str, texts)), locate(str(output), "--output"))


def test_a_folder_is_listed_with_all_below_it_and_others_are_skipped(folder: Path) -> None:
    inputs = find(folder)
    listed = {name: (entry.path, entry.size) for name, entry in inputs.files.items()}
    assert listed == {name: (str(folder / name), len(name)) for name in NAMES}
    assert inputs == find(f"/{folder}") == find(f"file://{folder}")
    assert [*find(f"file://{folder}/*.p*").files] == ["a.parquet"]
    assert inputs.root.path == str(folder)
    assert inputs.skipped == [str(folder / name) for name in SKIPPED]
    lines: list[str] = []
    report_skipped(inputs.skipped, lines.append)
    assert lines[0].startswith(f"skipped: 4, such as {folder}/.hidden.parquet (hidden, ")


FOUND = [
    (["*.parquet"], ["a.parquet"]),
    (["*/*/*.parq"], ["b/e/f.parq"]),
    (["*"], NAMES),
    (["**"], NAMES),
    (["**/*.parq*"], ["a.parquet", "b/c.parquet", "b/e/f.parq", "b/g,h [1].parquet"]),
    (["b/?.p[a-z]*", "*/e/**"], ["b/c.parquet", "b/e/f.parq"]),
    (["notes.txt", ".hidden.parquet"], [".hidden.parquet", "notes.txt"]),
    (["b/g,h [1].parquet"], ["b/g,h [1].parquet"]),
    (["b/e", "a.parquet", "b/e/f.parq"], ["a.parquet", "b/e/f.parq"]),
    (["b/**//*.parq"], ["b/e/f.parq"]),
    (["b/_temporary"], ["b/_temporary/x.parquet"]),
]


@pytest.mark.parametrize(("texts", "expected"), FOUND)
def test_folders_files_and_globs_are_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], expected: Sequence[str]
) -> None:
    monkeypatch.chdir(folder)
    paths = [str(folder / name) for name in expected]
    for inputs in (find(*texts), find(*(folder / text for text in texts))):
        assert [entry.path for entry in inputs.files.values()] == paths
        assert [(inputs.root / name).path for name in inputs.files] == paths


def test_what_is_not_there_is_named(folder: Path) -> None:
    for text, said in (
        ("missing", r"^--input .*/missing: there is no such file or folder \(/"),
        ("*.txt", r"there is no Parquet file \(\.parquet, \.pq, \.parq\)"),
    ):
        with pytest.raises(RequestError, match=said):
            find(folder / text)


APART = [
    (".", "out", True),
    ("b", ".", True),
    ("**/*.parquet", "out/deep", True),
    ("*/*.parquet", "b", True),
    ("*", "b/out", True),
    ("*/*.parquet", "out/deep", False),
    ("b*/*.parquet", "out", False),
    ("a.parquet", "b/out", False),
]


@pytest.mark.parametrize(("text", "output", "is_refused"), APART)
def test_output_and_input_lie_apart(folder: Path, text: str, output: str, is_refused: bool) -> None:
    refusal = pytest.raises(RequestError, match=r"^--output /.*: lies in the input /.* or ")
    link = folder.with_name("link")
    for place, other in ((folder, folder), (folder, link), (link, folder)):
        with refusal if is_refused else nullcontext():
            assert find(place / text, output=other / output).files


def test_a_folder_that_a_glob_matches_is_taken_as_if_it_was_named(folder: Path) -> None:
    """Spark writes such folders. The root stays that of the glob, whichever files come."""
    (folder / "spark.parquet").mkdir()
    (folder / "spark.parquet" / "part-0.parquet").write_bytes(b"x")
    inputs = find(folder / "s*.parquet")
    assert ([*inputs.files], inputs.root.path) == (["spark.parquet/part-0.parquet"], str(folder))
    assert [*find(folder / "*.parquet").files] == ["a.parquet", *inputs.files]


def test_a_link_to_a_file_is_a_file_and_one_below_a_folder_is_not_followed(folder: Path) -> None:
    (folder / "0.parquet").symlink_to("a.parquet")
    assert [*find(folder).files] == ["0.parquet", *NAMES]
    assert len(find(folder.with_name("link")).files) == 6, "one that is named is taken"


def test_what_cannot_be_opened_is_set_aside_alone(folder: Path) -> None:
    odd = [os.fsdecode(name) for name in (b"caf\xe9.parquet", b"b/two\nlines.parquet")]
    for name in odd:
        (folder / name).write_bytes(b"x")
    (folder / "gone.parquet").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.parquet")
    names = {"gone.parquet", "pipe.parquet"}
    for inputs in (find(folder), find(folder / "*"), find(folder / "**")):
        assert {*inputs.files} == {*NAMES} | names
        assert {str(folder / name) for name in odd} <= {*inputs.skipped}
    for name in names:
        with pytest.raises(UnusableFileError, match="is not a file, or is a broken link"):
            read_footer(inputs.root / name, inputs.files[name])


def test_a_folder_that_may_not_be_read_is_named_and_not_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "e":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(find(folder / "b" / "*.parquet").files) == 2
    with pytest.raises(RequestError, match=r"/e: cannot be listed: Permission denied$"):
        find(folder)


def test_a_store_is_listed_as_a_disk_but_for_globs(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["in/a.parquet", "in/b/c[1].parquet", "in/_temporary/x.parquet", "in/notes.txt"]
    with serve_s3(monkeypatch) as uri:
        bucket = locate(uri, "--input")
        for key in (*keys, "c.parquet"):
            (bucket / key).write(b"x")
        for key, root, found in (("in", "in", keys[:2]), (keys[1], "in/b", keys[1:2])):
            inputs = list_inputs([(bucket / key).display])
            assert inputs.root == bucket / root
            assert [inputs.root / name for name in inputs.files] == [bucket / one for one in found]
        assert list_inputs([(bucket / "in").display]).skipped == sorted(keys[2:])
        assert [*list_inputs([(bucket / "c.parquet").display]).files] == ["c.parquet"]
        said = r"^--input s3://\S+: there is no such file or folder .*; globs are for local paths$"
        with pytest.raises(RequestError, match=said):
            list_inputs([(bucket / "in/*.parquet").display])
        ask(int(uri.rpartition(":")[2]), "PUT", "/bucket/marked/")  # as consoles mark a folder
        (bucket / "marked" / "d.parquet").write(b"x")
        marked = list_inputs([(bucket / "marked").display])
        assert ([*marked.files], marked.skipped) == (["d.parquet"], [])
