"""`--input`: which files it names, under which names, and which are skipped."""

import os
from pathlib import Path

import pytest

from mnistsum_ray.data.inputs import Inputs, list_inputs
from mnistsum_ray.errors import RequestError
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
    assert inputs.files["size"].to_pylist() == [len(name) for name in sorted(NAMES)]
    assert inputs.files["modified"].to_pylist() == [(folder / name).stat().st_mtime_ns for name in sorted(NAMES)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet"]),
        ("*/*.parquet", ["c.parquet", "g,h [1].parquet"]),
        ("**/*.parq*", ["a.parquet", "b/_temporary/x.parquet", "b/c.parquet", "b/e/f.parq", "b/g,h [1].parquet"]),
        ("b/?.p[a-z]*", ["c.parquet"]),
        ("notes.*", ["notes.txt"]),
    ],
)
def test_globs_match_as_a_shell_does(folder: Path, pattern: str, expected: list[str]) -> None:
    found = find(folder / pattern)
    assert [Path(name).name for name in names(found)] == [Path(name).name for name in expected]


def test_a_file_may_have_any_name_and_several_values_share_one_root(folder: Path) -> None:
    assert names(find(folder / "notes.txt")) == ["notes.txt"]
    assert names(find(folder / "b/g,h [1].parquet")) == ["g,h [1].parquet"]
    both = find(folder / "b/e", folder / "a.parquet", folder / "b/e/f.parq")
    assert names(both) == ["a.parquet", "b/e/f.parq"]
    assert both.root.path == str(folder)


def test_names_do_not_depend_on_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "b")
    assert (
        names(find("_temporary/.."))
        == names(find("../b", "e/../c.parquet"))
        == ["c.parquet", "d.PQ", "e/f.parq", "g,h [1].parquet"]
    )


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=rf"--input {folder}/missing: there is no such file or folder \({folder}/missing\)"):
        find(folder / "missing")
    with pytest.raises(RequestError, match=r"there is no Parquet file .*\.pq, \.parq\)$"):
        find(folder / "*.orc")
    (folder / "c").mkdir()
    (folder / "c" / "rows.csv").write_text("1")
    with pytest.raises(RequestError, match=r"there is no Parquet file .*rows\.csv"):
        find(folder / "c")


@pytest.mark.parametrize(
    ("texts", "output", "message"),
    [
        (["."], ".", "lies in the input"),
        (["."], "out", "lies in the input"),
        (["b"], ".", "holds the input file"),
        (["a.parquet"], ".", "holds the input file"),
        (["*/*.parquet"], "out", "lies in the input"),
        (["**/*.parquet"], "out/deep", "lies in the input"),
        (["*.parquet"], "out", None),
        (["b"], "out", None),
        (["a.parquet"], "b/out", None),
    ],
)
def test_an_output_inside_the_input_and_an_input_inside_the_output_are_refused(
    folder: Path, tmp_path: Path, texts: list[str], output: str, message: str | None
) -> None:
    (tmp_path / "link").symlink_to(folder)
    for place, other in ((folder, folder), (folder, tmp_path / "link"), (tmp_path / "link", folder)):
        values = [place / text for text in texts]
        if message is None:
            assert names(find(*values, output=other / output))
            continue
        with pytest.raises(RequestError, match=message):
            find(*values, output=other / output)


def test_links_to_folders_below_an_input_are_left_out_and_one_that_is_named_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "up").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.parquet").write_bytes(b"z")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    for value in (folder, folder / "**" / "*.p*"):
        inputs = find(value)
        assert "z.parquet" not in " ".join(names(inputs))
        assert inputs.skipped[str(folder / "more")] == inputs.skipped[str(folder / "b" / "up")] == "a link to a folder"
    assert names(find(folder)) == sorted(NAMES)
    assert names(find(folder / "more")) == ["z.parquet"]


def test_a_device_and_a_pipe_are_called_that(folder: Path) -> None:
    os.mkfifo(folder / "pipe.parquet")
    (folder / "zero.parquet").symlink_to("/dev/zero")
    inputs = find(folder)
    assert inputs.skipped[str(folder / "zero.parquet")] == "a link to a device"
    assert inputs.skipped[str(folder / "pipe.parquet")] == "a pipe or a socket, not a regular file"
    for name, message in (("pipe.parquet", "is a pipe or a socket, not a regular file"), ("zero.parquet", "is a device")):
        with pytest.raises(RequestError, match=message):
            find(folder / name)


def test_a_file_with_two_names_is_listed_once(folder: Path) -> None:
    (folder / "latest.parquet").symlink_to(folder / "a.parquet")
    inputs = find(folder)
    assert names(inputs) == sorted(NAMES)
    assert inputs.skipped[str(folder / "latest.parquet")] == "a link to a file that is listed anyway"
    assert names(find(folder / "latest.parquet")) == ["a.parquet"], "a link that is named itself is listed"


def test_a_file_whose_name_is_not_utf8_is_unusable(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.parquet")).write_bytes(b"x")
    inputs = find(folder)
    assert inputs.unusable == {"caf\\udce9.parquet": "its name is not UTF-8; rename it"}
    assert names(inputs) == sorted([*NAMES, "caf\\udce9.parquet"])


def test_a_file_in_the_root_folder_of_the_disk(tmp_path: Path) -> None:
    file = Path("/mnistsum_ray-test.parquet")
    try:
        file.write_bytes(b"x")
    except OSError:
        pytest.skip("this user may not write there")
    try:
        inputs = find(file, output=tmp_path / "out")
    finally:
        file.unlink()
    assert (inputs.root.path, names(inputs)) == ("/", ["mnistsum_ray-test.parquet"])
