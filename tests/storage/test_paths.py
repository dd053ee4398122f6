"""Paths and URIs are resolved as a user expects; one that holds a key is refused and shown nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env.working_dir import WorkingDirPlugin

from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.object_store import options_of
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder
from mnistsum_ray.storage.uri import may_hold_keys


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
    assert output_base_folder() == tmp_path / "home", f"ray: submitted jobs now run in {copies.name}/"
    (tmp_path / "home" / "runs").mkdir(parents=True)
    assert locate_existing("runs", "--model").path == str(tmp_path / "home" / "runs")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense://x/y", "--output nonsense://x/y: Unrecognized filesystem type in URI: nonsense://"),
        ("~nosuchuser/data", "--output ~nosuchuser/data: there is no home folder of that name"),
        ("/tmp/caf\udce9", "holds characters that no path can have"),
        ("/tmp/a\0b", "holds characters that no path can have"),
        ("s3://AKIA:topsecret@bucket/x", "--output: must have no user info"),
    ],
)
def test_a_path_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        locate(text, "--output")
    assert reason in str(refused.value)
    assert "topsecret" not in str(refused.value)


def test_a_key_of_azure_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    place = locate("abfs://container@account.dfs.core.windows.net/a", "--output")
    assert (place.path, place.display) == ("container/a", "abfs://container@account.dfs.core.windows.net/a")
    assert options_of(place.filesystem)["account_key"] == "c2VjcmV0"


KEYS = """
s3://AKIA:topsecret@b/in s3:/AKIA:topsecret@b/in s3:AKIA:topsecret@b/in s3//AKIA:topsecret@b/in
//AKIA:topsecret@b/in AKIA:topsecret@b/in s3://topsecret@b/in s3://AKIA:top/secret@b/in
s3://AKIA:1/topsecret@b/in s3://AKIA:topsecret%40b/in s3://AKIA:topsecret@[x/y
s3://b/in?key=topsecret s3://b/in?region=x&topsecret s3://b/in?endpoint_override=http%3A%2F%2Fme%3Atopsecret%40h
abfs://account:topsecret@container/in abfs://container@a.dfs.core.windows.net/in?sig=topsecret
gs://topsecret@b/in https://me:topsecret@host
"""

NO_KEYS = """
s3://b/a@b:c/*?region=x&scheme=http&endpoint_override=h:1&allow_bucket_creation=true gs://anonymous@b/in
abfs://container@a.dfs.core.windows.net/in http://127.0.0.1:5000 http://[::1]:5000 sqlite:////tmp/store.db
/tmp/10:30@home ./10:30@home days/what?now=*
"""

URIS = {
    "train": "--data --storage-path --mlflow --config --name --epochs --nonsense",
    "score": "--model --input --output --config",
    "export-pairs": "--data --output --config",
    "export-model": "--model --output --config",
    "predict": "--model --config",
}
"""Flags of the commands that may be given a URI."""


def test_a_text_that_may_hold_a_key_is_known() -> None:
    """Also where its scheme is mistyped or missing."""
    assert [text for text in KEYS.split() if not may_hold_keys(text)] == []
    assert [text for text in NO_KEYS.split() if may_hold_keys(text)] == []


def test_a_uri_with_a_key_is_refused_by_each_flag_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before Ray is connected to, whose table of jobs has the command line; alike in config files."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("connected to Ray"))
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("data: s3://AKIA:topsecret@b")
    Path("b.yaml").write_text("epochs: s3://AKIA:topsecret@b")
    Path("c.yaml").write_text("data: s3://AKIA:topsecret@b: ]")
    requests = [[command, flag, uri] for command, flags in URIS.items() for flag in flags.split() for uri in KEYS.split()[:2]]
    requests += [["train", "--config", name] for name in ("a.yaml", "b.yaml", "c.yaml")]
    first = KEYS.split()[0]
    requests += [["predict", first, "--number", "5"], ["train", first]]
    for command, *flags in requests:
        with pytest.raises(RequestError) as refused:
            cli._run_command(command, flags)
        hint = {"c.yaml": "is not YAML", "--nonsense": "no such flag"}
        expected = next((hint[word] for word in flags if word in hint), "keys belong in the environment")
        assert expected in str(refused.value), flags
        assert not {"topsecret", "AKIA"} & set(re.findall(r"\w+", str(refused.value)))
    assert cli.main([first]) == 2
    job = Path(__file__).parents[2] / "jobs" / "train.py"
    done = subprocess.run([sys.executable, job, "--data", first], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --data: must have no user info")
    assert not {"topsecret", "AKIA"} & set(re.findall(r"\w+", done.stderr + "".join(capfd.readouterr())))
    assert len(list(tmp_path.iterdir())) == 3, "nothing is written"
