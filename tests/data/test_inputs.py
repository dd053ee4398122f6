"""`--input`: which files it names, under which names, and which are left out."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mnistsum_ray.data.inputs import Inputs, list_inputs, report_skipped
from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import ask, serve_s3

NAMES = ("a.parquet", "b/c.parquet", "b/d.PQ", "b/e/f.parq", "b/g,h [1].parquet")
SKIPPED = (".hidden.parquet", "_SUCCESS", "b/_temporary", "b/up", "notes.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in (*NAMES, *SKIPPED[:2], "b/_temporary/x.parquet", "notes.txt"):
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
    assert inputs == find(f"/{folder}")
    assert inputs.root.path == str(folder)
    assert inputs.skipped == [str(folder / name) for name in SKIPPED]
    lines: list[str] = []
    report_skipped(inputs.skipped, lines.append)
    assert lines[0].startswith(f"left out: 5, such as {folder}/.hidden.parquet (hidden, ")


FOUND = [
    (["*.parquet"], ["a.parquet"]),
    (["*/*/*"], ["b/e/f.parq"]),
    (["**/*.parq*"], ["a.parquet", "b/c.parquet", "b/e/f.parq", "b/g,h [1].parquet"]),
    (["b/?.p[a-z]*", "*/e/**"], ["b/c.parquet", "b/e/f.parq"]),
    (["notes.txt", ".hidden.parquet"], [".hidden.parquet", "notes.txt"]),
    (["b/g,h [1].parquet"], ["b/g,h [1].parquet"]),
    (["b/e", "a.parquet", "b/e/f.parq"], ["a.parquet", "b/e/f.parq"]),
    (["b/**//*.parq"], ["b/e/f.parq"]),
    (["b/_temporary/..", "b/_temporary"], ["b/_temporary/x.parquet", *NAMES[1:]]),
]


@pytest.mark.parametrize(("texts", "expected"), FOUND)
def test_folders_files_and_globs_are_found_as_a_shell_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(folder)
    paths = [str(folder / name) for name in expected]
    for inputs in (find(*texts), find(*(folder / text for text in texts))):
        assert [entry.path for entry in inputs.files.values()] == paths
        assert [(inputs.root / name).path for name in inputs.files] == paths


@pytest.mark.timeout(30)
def test_what_is_not_there_is_named(folder: Path) -> None:
    for text, said in (
        ("missing", r"^--input .*/missing: there is no such file or folder \(/"),
        ("*.txt", r"there is no Parquet file \(\.parquet, \.pq, \.parq\)"),
        # /proc is not read; an ordinary user may not look into some other folder.
        ("/*/nobody-has-such-a-file", r"there is no Parquet file|Permission denied \(/\w+\)"),
    ):
        with pytest.raises(RequestError, match=said):
            find(folder / text)


APART = [
    (".", "out", True),
    ("b", ".", True),
    ("**/*.parquet", "out/deep", True),
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


def test_a_folder_whose_name_matches_is_no_file(folder: Path) -> None:
    """Spark writes such folders. A line says that their files are left out."""
    (folder / "spark.parquet").mkdir()
    (folder / "spark.parquet" / "part-0.parquet").write_bytes(b"x")
    (folder / "other.parquet").symlink_to("spark.parquet")
    inputs = find(folder / "*.parquet")
    assert [*inputs.files] == ["a.parquet"]
    left_out = (".hidden.parquet", "other.parquet", "spark.parquet")
    assert inputs.skipped == [str(folder / name) for name in left_out]


def test_what_cannot_be_opened_is_set_aside_alone(folder: Path) -> None:
    good, other = "b/caf\u00e9 \u3000.parquet", "b/two\\nlines.parquet"
    for name in (b"caf\xe9.parquet", b"b/two\nlines.parquet", good.encode()):
        (folder / os.fsdecode(name)).write_bytes(b"x")
    for link, target in {"gone": "nowhere", "loop": "loop.parquet", "device": "/dev/zero"}.items():
        (folder / f"{link}.parquet").symlink_to(target)
    os.mkfifo(folder / "pipe.parquet")
    inputs = find(folder)
    reasons = dict.fromkeys(("caf\\udce9.parquet", other), "name is not UTF-8, or")
    for link in ("gone", "loop", "device", "pipe"):
        reasons[f"{link}.parquet"] = "is no file, or a link to none"
    assert set(inputs.files) == {*NAMES, *reasons, good}
    for file, reason in reasons.items():
        with pytest.raises(UnusableFileError, match=reason):
            read_footer(inputs.root / file, inputs.files[file])
    (folder / other).write_bytes(b"y")  # it has the name of the odd one, as that is printed
    assert find(folder).files[other].path == str(folder / other)
    assert str(folder / "b/two\nlines.parquet") in find(folder).skipped


def test_a_file_that_is_there_under_two_names_is_taken_once(folder: Path) -> None:
    """Its rows would count twice. A link to a file elsewhere is taken, the first one to it."""
    (folder.parent / "blob").write_bytes(b"x")
    for name, target in (("0", "a.parquet"), ("first", "../blob"), ("second", "../blob")):
        (folder / f"{name}.parquet").symlink_to(target)
    inputs = find(folder, folder / "0.parquet")
    assert [*inputs.files] == [*NAMES, "first.parquet"]
    assert {str(folder / "0.parquet"), str(folder / "second.parquet")} <= set(inputs.skipped)
    (folder.parent / "latest").symlink_to(folder)
    inputs = find(folder, folder.parent / "latest")
    assert [name for name in inputs.files if name.startswith("latest")] == []
    assert str(folder.parent / "latest" / NAMES[0]) in inputs.skipped
    assert len(find(folder.parent / "latest").files) == len(NAMES) + 1, "alone it is taken"


def test_a_folder_that_may_not_be_read_is_named_and_not_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one that no glob names, such as `lost+found`."""
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "e":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(find(folder / "b" / "*.parquet").files) == 2
    with pytest.raises(RequestError, match="cannot be listed: Permission denied"):
        find(folder)


def test_a_store_is_listed_as_a_disk_and_a_table_of_delta_lake_is_refused_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds files that its log has removed."""
    said = r"^--input \S+: holds a table of Delta Lake; .*; jobs/examples/dataset.py scores one$"
    keys = ["in/a.parquet", "in/b/c.parquet", "in/_temporary/x.parquet", "in/notes.txt"]
    keys += ["table/_delta_log/0.json", "table/a.parquet", "c.parquet"]
    found = {"in": keys[:2], "in/**/*.parquet": keys[:2], "i*/**": keys[:2], keys[0]: keys[:1]}
    found |= {"*.parquet": keys[-1:], "c.parquet": keys[-1:]}
    with serve_s3(monkeypatch) as uri:
        for root in (str(tmp_path), uri):
            place = locate(root, "--input")
            for key in keys:
                (place / key).write(b"x")
            for glob, expected in found.items():
                inputs = list_inputs([(place / glob).display])
                assert [inputs.root / name for name in inputs.files] == [
                    place / k for k in expected
                ]
            assert len(list_inputs([(place / "in").display]).skipped) == 2
            for glob in ("table", "table/*.parquet", "**/*.parquet"):
                with pytest.raises(RequestError, match=said):
                    list_inputs([(place / glob).display])
        for key, data in (("d.parquet", b""), ("d.parquet/day=1/p.parquet", b"x")):
            (place / "marked" / key).write(data)  # the first only marks a folder
        assert [*list_inputs([(place / "marked").display]).files] == ["d.parquet/day=1/p.parquet"]


def test_an_odd_key_is_left_out_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them ends a listing of obstore."""
    odd = ["odd/./c.txt", "odd/../b.parquet", "odd//b.parquet", "odd/\x01.parquet"]
    with serve_s3(monkeypatch) as uri:
        for key in [*odd, "odd/b.parquet", "odd/deep/c.parquet"]:
            ask(int(uri.rpartition(":")[2]), "PUT", f"/bucket/{quote(key)}", key)
        place = locate(uri, "--input") / "odd"
        good = {name: (place / name).file_entry() for name in ("b.parquet", "deep/c.parquet")}
        assert [*good.values()] == place.files()
        for value, count in ((place, 2), (place / "*.parquet", 1)):
            inputs = list_inputs([value.display])
            assert [*inputs.files.items()] == [*good.items()][:count]
            assert inputs.skipped == sorted(odd)
