"""What `--input` names is found, said, and called by its place below one folder."""

import os
from pathlib import Path

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.inputs import Inputs, list_inputs
from mnistsum_ray.storage.location import locate

NAMES = ("a.parquet", "b/c.parquet", "b/d.PQ", "b/e/f.parq", "b/g,h [1].parquet")
ASIDE = ("notes.txt", "_SUCCESS", ".hidden.parquet", "b/_temporary/x.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in (*NAMES, *ASIDE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    return root


def find(*texts: object, output: Path = Path("/nowhere/out")) -> Inputs:
    return list_inputs(tuple(map(str, texts)), locate(str(output), "--output"))


def names(inputs: Inputs) -> list[str]:
    found: list[str] = inputs.files["name"].to_pylist()
    return found


def test_a_folder_is_taken_whole_and_what_is_not_taken_is_said(folder: Path) -> None:
    inputs = find(folder)
    assert names(inputs) == sorted(NAMES)
    assert inputs.root.path == str(folder)
    aside = {name.replace("_temporary/x.parquet", "_temporary") for name in ASIDE}
    assert set(inputs.skipped) == {str(folder / name) for name in aside}
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


def test_a_file_is_taken_whatever_its_name_and_a_list_shares_one_root(folder: Path) -> None:
    assert names(find(folder / "notes.txt")) == ["notes.txt"]
    assert names(find(folder / "b/g,h [1].parquet")) == ["g,h [1].parquet"]
    both = find(folder / "b/e", folder / "a.parquet", folder / "b/e/f.parq")
    assert names(both) == ["a.parquet", "b/e/f.parq"]
    assert both.root.path == str(folder)


def test_relative_names_do_not_depend_on_where_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "b")
    assert (
        names(find("_temporary/.."))
        == names(find("../b", "e/../c.parquet"))
        == ["c.parquet", "d.PQ", "e/f.parq", "g,h [1].parquet"]
    )


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["missing"], "--input {folder}/missing: there is no {folder}/missing"),
        (["*.orc"], "there is no Parquet file"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, texts: list[str], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        find(*(folder / text for text in texts))
    assert said.format(folder=folder) in str(refused.value)


def test_a_folder_without_parquet_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1")
    with pytest.raises(RequestError, match=r"there is no Parquet file .*rows\.csv"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("texts", "output", "said"),
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
def test_output_and_input_are_kept_apart(folder: Path, texts: list[str], output: str, said: str | None) -> None:
    values = [folder / text for text in texts]
    if said is None:
        assert names(find(*values, output=folder / output))
        return
    with pytest.raises(RequestError, match=said):
        find(*values, output=folder / output)


def test_a_link_does_not_hide_that_the_output_lies_in_the_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RequestError, match="lies in the input"):
        find(tmp_path / "link", output=folder / "out")
    with pytest.raises(RequestError, match="lies in the input"):
        find(folder, output=tmp_path / "link" / "out")


def test_a_link_to_a_parent_scores_nothing_twice(folder: Path) -> None:
    (folder / "b" / "up").symlink_to(folder)
    assert names(find(folder)) == sorted(NAMES)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_input_to_the_output_is_refused_the_first_time_as_the_second(
    folder: Path, tmp_path: Path, *, there: bool
) -> None:
    output = tmp_path / "elsewhere" / "out"
    if there:
        output.mkdir(parents=True)
    (folder / "b" / "results").symlink_to(output)
    with pytest.raises(RequestError, match=r"lies in the input .*, by the link .*/b/results, and would be scored next time"):
        find(folder, output=output)


def test_a_link_to_a_folder_above_the_output_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "all").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="by the link"):
        find(folder, output=tmp_path / "elsewhere" / "out")


def test_one_file_under_two_names_is_scored_once(folder: Path) -> None:
    (folder / "latest.parquet").symlink_to(folder / "a.parquet")
    inputs = find(folder)
    assert names(inputs) == sorted(NAMES)
    assert inputs.skipped[str(folder / "latest.parquet")] == "a link to what is listed anyway"
    assert names(find(folder / "latest.parquet")) == ["a.parquet"], "named by itself, it is taken"


def test_a_name_that_is_not_utf8_costs_that_file(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.parquet")).write_bytes(b"x")
    inputs = find(folder)
    assert inputs.unusable == {"caf\\udce9.parquet": "its name is not UTF-8; rename it"}
    assert names(inputs) == sorted([*NAMES, "caf\\udce9.parquet"])


def test_a_file_right_below_the_root_of_the_disk_has_a_folder(tmp_path: Path) -> None:
    file = Path("/mnistsum_ray-test.parquet")
    try:
        file.write_bytes(b"x")
    except OSError:
        pytest.skip("takes the right to write there")
    try:
        inputs = find(file, output=tmp_path / "out")
    finally:
        file.unlink()
    assert (inputs.root.path, names(inputs)) == ("/", ["mnistsum_ray-test.parquet"])
