"""Paths and URIs of the command line are resolved as a user expects, and keys in URIs are not shown."""

from pathlib import Path

import pytest
from ray._private.runtime_env.working_dir import WorkingDirPlugin

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.object_store import options_of
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder


def test_relative_paths_start_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs", "--storage-path").display == str(tmp_path / "runs")
    assert locate("runs/../other", "--storage-path").display == str(tmp_path / "other")


def test_a_submitted_job_writes_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its working folder is a temporary copy; Ray itself makes the folder of such copies here."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert output_base_folder() == tmp_path
    WorkingDirPlugin(str(tmp_path / "runtime_resources"), None)
    (copies,) = (tmp_path / "runtime_resources").iterdir()
    copy = copies / "_ray_pkg_0"
    copy.mkdir()
    monkeypatch.chdir(copy)
    assert output_base_folder() == tmp_path / "home", (
        f"ray: submitted jobs now run in {copies.name}/, which paths.py does not know"
    )
    (tmp_path / "home" / "runs").mkdir(parents=True)
    assert locate_existing("runs", "--model").path == str(tmp_path / "home" / "runs")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (
            "s3://AKIA:se%2Fcret@bucket/a?endpoint_override=h:1&allow_bucket_creation=true",
            "s3://bucket/a?endpoint_override=h%3A1",
        ),
        (
            "s3://AKIA:se%2Fcret@bucket/a?region=x&endpoint_override=http%3A%2F%2Fme%3Apassword%40h%3A1",
            "s3://bucket/a?region=x&endpoint_override=http%3A%2F%2Fh%3A1",
        ),
    ],
)
def test_keys_in_a_uri_are_used_and_not_shown(uri: str, shown: str) -> None:
    place = locate(uri, "--output")
    assert place.display == shown
    assert (place / "b").display.startswith("s3://bucket/a/b?")
    assert options_of(place.filesystem)["secret_key"] == "se/cret"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://AKIA:top/secret@bucket/x", "write a / in a key as %2F"),
        ("s3://AKIA:topsecret@[x/y", "syntax error at character 'x'"),
        ("nonsense://AKIA:topsecret@x/y", "Unrecognized filesystem type in URI: nonsense://"),
        ("s3://AKIA:topsecret@bucket/x?region=x&other=topsecret", "Unexpected query parameter in S3 URI: 'other'"),
        ("~nosuchuser/data", "--output ~nosuchuser/data: there is no home folder of that name"),
        ("/tmp/caf\udce9", "holds characters that no path can have"),
        ("/tmp/a\0b", "holds characters that no path can have"),
    ],
)
def test_a_path_is_refused_with_the_reason_and_without_its_keys(text: str, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        locate(text, "--output")
    assert reason in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "AKIA" not in str(refused.value)
