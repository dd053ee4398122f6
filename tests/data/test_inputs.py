"""`--input`: which files it names, under which names, and which are left out; a glob reads no folder without a match."""

import os
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.data.inputs import Inputs, list_inputs, matches, report_skipped
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import ask, s3

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
    return [*inputs.files]


def test_a_folder_is_listed_with_all_below_it_and_other_files_are_skipped(folder: Path) -> None:
    inputs = find(folder)
    assert names(inputs) == sorted(NAMES)
    assert inputs.root.path == str(folder)
    assert inputs.skipped == [str(folder / name.replace("/x.parquet", "")) for name in sorted(SKIPPED)]
    for name, entry in inputs.files.items():
        assert (entry.path, entry.size) == (str(folder / name), len(name))
    lines: list[str] = []
    report_skipped(inputs.skipped, lines.append)
    assert lines == [f"left out: 4, such as {folder}/.hidden.parquet (hidden, without a suffix of Parquet, or links to folders)"]


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


def test_a_glob_looks_only_where_it_can_match(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="there is no Parquet file"):
        find("/*/nobody-has-such-a-file")  # without a walk over the disk, and /proc
    walk, opened = os.scandir, []

    def noted(place: str) -> Any:
        opened.append(place)
        return walk(place)

    monkeypatch.setattr("os.scandir", noted)
    assert names(find(folder / "*" / "c.parquet")) == ["b/c.parquet"]
    assert opened == [str(folder), str(folder / "b")]


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
        ("b", ".", "holds the input "),
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


def test_links_to_files_are_followed_and_those_to_folders_only_where_they_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder / "b")
    (folder / "up").symlink_to(folder)
    (folder / "latest.parquet").symlink_to(folder / "a.parquet")
    assert names(find(folder)) == sorted([*NAMES, "latest.parquet"])
    assert str(folder / "up") in find(folder).skipped
    assert names(find(tmp_path / "link")) == names(find(folder / "b"))
    assert names(find(folder / "latest.parquet")) == ["latest.parquet"]


def test_what_cannot_be_opened_is_set_aside_alone(folder: Path) -> None:
    for name in (b"caf\xe9.parquet", b"b/two\nlines.parquet", "b/caf\u00e9 \u3000.parquet".encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")
    (folder / "gone.parquet").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.parquet")
    inputs = find(folder)
    assert inputs.unusable == {
        "caf\\udce9.parquet": "its name is not UTF-8; rename it",
        "b/two\\nlines.parquet": "its name holds a control character; rename it",
        "gone.parquet": "is a link that leads nowhere, or no file",
        "pipe.parquet": "is a link that leads nowhere, or no file",
    }
    assert set(inputs.files) == {*NAMES, *inputs.unusable, "b/caf\u00e9 \u3000.parquet"}


@pytest.mark.parametrize("log", ["_delta_log/0.json", "b/_delta_log/0.json", "metadata/v1.metadata.json"])
def test_a_table_of_delta_lake_or_iceberg_is_refused_but_not_its_single_files(folder: Path, log: str) -> None:
    (folder / log).parent.mkdir()
    (folder / log).touch()
    table = (folder / log).parent.parent
    for text in (folder, folder / "**/*.p*"):
        with pytest.raises(RequestError, match=f"--input {table}: is a table of Delta Lake or Iceberg, .* or name the files"):
            find(text)
    assert names(find(folder / "a.parquet", folder / "b/c.parquet")) == ["a.parquet", "b/c.parquet"]
    assert names(find(folder / "b/e")) == ["f.parq"]


def test_an_object_store_is_listed_as_a_disk_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def listed(key: str) -> Inputs:
        return list_inputs([uri.replace("?", f"/{key}?")])

    keys = ["in/a.parquet", "in/b/c.parquet", "in/b/notes.txt", "in/_temporary/x.parquet", "in2/a.parquet"]
    with s3(monkeypatch, tmp_path) as uri:
        for key in (*keys, "lake/part.parquet", "lake/_delta_log/0.json", "odd/c.parquet"):
            (locate(uri, "--input") / key).write(b"x")
        assert names(listed("in")) == names(listed("in/**/*.parquet")) == ["a.parquet", "b/c.parquet"]
        assert listed("in").skipped == ["in/_temporary/x.parquet", "in/b/notes.txt"]
        assert names(listed("in/b/*")) == ["c.parquet", "notes.txt"]
        assert (names(listed(keys[0])), listed(keys[0]).root.path) == (["a.parquet"], "in")
        assert names(listed("in*/a.parquet")) == ["in/a.parquet", "in2/a.parquet"]
        for key in ("", "lake", "*/part.parquet"):
            with pytest.raises(RequestError, match=r"s3://bucket/lake\?.* is a table of Delta"):
                listed(key)
        ask(int(uri.rpartition(":")[2]), "PUT", "/bucket/odd//b.parquet", "x")
        with pytest.raises(RequestError, match=r'^--input s3://bucket/odd\?.* invalid path: Path "odd//b.parquet"'):
            listed("odd")
        assert names(listed("odd/c.parquet")) == ["c.parquet"]
