"""Paths and URIs are resolved; one that holds a key is refused and shown nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env.working_dir import WorkingDirPlugin

from mnistsum_ray.arguments import parse
from mnistsum_ray.cli import COMMANDS
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.uri import (
    empty_output,
    locate,
    locate_existing,
    may_hold_keys,
    output_base_folder,
    split_glob,
)


def test_a_path_or_uri_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = {
        "runs": tmp_path / "runs",
        "runs/../other": tmp_path / "other",
        "file:///a/b": "/a/b",
        "~": Path.home(),
    }
    azure = "abfs://container@account.dfs.core.windows.net/a"
    query = "region=eu-west-1&scheme=http&endpoint_override=h:1"
    there = {"s3a://b/c/": "s3://b/c", "gs://b/c": "gs://b/c", azure: azure}
    for text, display in (here | there).items():
        assert locate(text, "--output").display == str(display)
    assert (locate(f"s3://b/c?{query}", "--output") / "d").display == f"s3://b/c/d?{query}"
    assert split_glob(f"s3://b/c/**/*.p?{query}") == (f"s3://b/c/?{query}", ("**", "*.p"))
    assert split_glob("c/[ab]?/d") == ("c/", ("[ab]?", "d"))
    assert split_glob("s3://b/c?region=x") == ("s3://b/c?region=x", None)


def test_a_submitted_job_writes_to_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its working folder is a temporary copy; Ray itself makes the folder of such copies here."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    WorkingDirPlugin(str(tmp_path / "runtime_resources"), None)
    (copies,) = (tmp_path / "runtime_resources").iterdir()
    for folder in (copies / "_ray_pkg_0", tmp_path / "home" / "runs"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(copies / "_ray_pkg_0")
    assert output_base_folder() == tmp_path / "home", f"jobs now run in {copies.name}/"
    expected = str(tmp_path / "home" / "runs")
    assert locate_existing("runs", "--model").path == empty_output("runs").path == expected
    (tmp_path / "home" / "runs" / "file").touch()
    with pytest.raises(RequestError, match="is not empty"):
        empty_output("runs")


REFUSED = {
    "nonsense://x/y": "--output nonsense://x/y: there is no storage nonsense://, but s3://, gs://",
    "~nosuchuser/data": "--output ~nosuchuser/data: there is no home folder of that name",
    "/tmp/caf\udce9": "holds characters that no path can have",
    "/tmp/a\0b": "holds characters that no path can have",
    "s3:/AKIA:topsecret@b/in": "--output: must have no user info",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_path_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        locate(text, "--output")
    assert REFUSED[text] in str(refused.value)
    assert "topsecret" not in str(refused.value)


KEYS = """
s3://AKIA:topsecret@b/in s3:/AKIA:topsecret@b/in s3:AKIA:topsecret@b/in s3//AKIA:topsecret@b/in
//AKIA:topsecret@b/in AKIA:topsecret@b/in s3://topsecret@b/in s3://AKIA:top/secret@b/in
s3://AKIA:1/topsecret@b/in s3://AKIA:topsecret%40b/in s3://AKIA:topsecret@[x/y
s3://b/in?key=topsecret s3://b/in?region=x&topsecret
s3://b/in?endpoint_override=http%3A%2F%2Fme%3Atopsecret%40h
abfs://account:topsecret@container/in abfs://container@a.dfs.core.windows.net/in?sig=topsecret
gs://anonymous@b/in gs://topsecret@b/in https://me:topsecret@host
"""

NO_KEYS = """
s3://b/a@b:c/*?region=x&scheme=http&endpoint_override=h:1&allow_bucket_creation=true
abfs://container@a.dfs.core.windows.net/in
http://127.0.0.1:5000 http://[::1]:5000 sqlite:////tmp/store.db
/tmp/10:30@home ./10:30@home days/what?now=*
"""


def test_a_text_that_may_hold_a_key_is_known() -> None:
    """Also where its scheme is mistyped or missing."""
    assert [text for text in KEYS.split() if not may_hold_keys(text)] == []
    assert [text for text in NO_KEYS.split() if may_hold_keys(text)] == []


FLAGS = {
    "train": "--data --storage-path --mlflow --config --name --epochs",
    "score": "--model --input --output --config",
    "export-pairs": "--data --output --config",
    "export-model": "--model --output --config",
    "predict": "--model --config",
}
"""Those that may be given a URI."""


def test_a_uri_with_a_key_is_refused_by_each_flag_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before Ray is joined, whose table of jobs has the command line; alike in config files."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("connected to Ray"))
    monkeypatch.chdir(tmp_path)
    first, second, *_ = KEYS.split()
    requests = [["predict", first, "--number", "5"]]
    for command, flags in FLAGS.items():
        requests += [[command, flag, uri] for flag in flags.split() for uri in (first, second)]
    texts = {"a.yaml": f"data: {first}", "b.yaml": f"epochs: {first}", "c.yaml": f"x: {first}: ]"}
    for name, text in texts.items():
        Path(name).write_text(text)
        requests.append(["train", "--config", name])
    for command, *words in requests:
        with pytest.raises(RequestError) as refused:
            parse(COMMANDS[command][1], words)
        said = "is not YAML" if "c.yaml" in words else "keys belong in the environment"
        assert said in str(refused.value), words
        assert not re.search("topsecret|AKIA", str(refused.value))
    job = Path(__file__).parents[2] / "jobs" / "train.py"
    done = subprocess.run([sys.executable, job, "--data", first], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --data: must have no user info")
    assert not re.search("topsecret|AKIA", done.stderr + "".join(capfd.readouterr()))
    assert len(list(tmp_path.iterdir())) == 3, "nothing is written"
