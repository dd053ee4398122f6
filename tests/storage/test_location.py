"""Paths and URIs lead where a person thinks they do."""

import pickle
from pathlib import Path

import pytest
from pyarrow.fs import S3FileSystem

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import base_folder, locate


def test_relative_paths_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs", "--storage-path").display == str(tmp_path / "runs")
    assert locate("runs/../other", "--storage-path").display == str(tmp_path / "other")


def test_a_submitted_job_does_not_write_into_its_temporary_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_folder() == tmp_path / "home"


def test_files_come_back(tmp_path: Path) -> None:
    place = locate(str(tmp_path), "--storage-path") / "a" / "b.json"
    assert not place.exists()
    place.write_json({"x": [1, 2]})
    assert place.read_json() == {"x": [1, 2]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"], "nothing partial is left beside it"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIA:se%2Fcret@bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
        (
            "s3://AKIA:se%2Fcret@bucket/a?endpoint_override=h:1&allow_bucket_creation=true",
            "s3://bucket/a?endpoint_override=h%3A1",
        ),
    ],
)
def test_keys_in_a_uri_are_used_and_not_shown(uri: str, shown: str) -> None:
    place = locate(uri, "--output")
    assert place.display == shown
    assert (place / "b").display.startswith("s3://bucket/a/b?")
    assert "'secret_key': 'se/cret'" in str(place.filesystem.__reduce__())


@pytest.mark.parametrize("uri", ["s3://AKIA:top/secret@bucket/x", "s3://AKIA:topsecret@[x/y", "nonsense://me:topsecret@x/y"])
def test_keys_in_a_uri_that_cannot_be_used_are_not_shown_either(uri: str) -> None:
    with pytest.raises(RequestError) as refused:
        locate(uri, "--output")
    assert "secret" not in str(refused.value)
    assert "AKIA" not in str(refused.value)


def test_s3_stays_patient_in_another_process() -> None:
    place = locate("s3://bucket/a?region=eu-west-1", "--output").with_retries()
    there = pickle.loads(pickle.dumps(place))
    assert type(there.filesystem) is type(place.filesystem) is not S3FileSystem
    assert there == place


def test_a_uri_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(RequestError, match="--data nonsense://x"):
        locate("nonsense://x", "--data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("~nosuchuser/data", "--data ~nosuchuser/data: there is no home folder of that name"),
        ("/tmp/caf\udce9", "holds characters that no path has here"),
        ("/tmp/a\0b", "holds characters that no path has here"),
        ("s3://bucket/a\0b", "holds characters that no path has here"),
    ],
)
def test_a_path_that_no_system_has_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        locate(text, "--data")
    assert said in str(refused.value)


def test_an_unfinished_file_has_a_short_name(tmp_path: Path) -> None:
    """A file's own name may be as long as the system allows."""
    place = locate(str(tmp_path), "--output") / ("x" * 255)
    place.write_bytes(b"whole")
    assert place.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_files_below_a_link_to_a_folder_are_not_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert [info.base_name for info in locate(str(tmp_path / "in"), "--output").files()] == ["a"]


def test_json_that_is_nested_without_end_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        locate(str(tmp_path / "a.json"), "--output").read_json()
