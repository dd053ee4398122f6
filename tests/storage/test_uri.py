"""Paths and URIs are resolved; one that holds a key is refused and shown nowhere."""

import re
from pathlib import Path

import pytest
import ray

from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.uri import (
    empty_output,
    locate,
    locate_existing,
    may_hold_keys,
    output_base_folder,
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


def test_a_submitted_job_writes_to_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its working folder is a temporary copy. A real one: tests/integration/test_connect.py."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0"
    for folder in (copy, tmp_path / "home" / "runs"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert output_base_folder() == tmp_path / "home"
    expected = str(tmp_path / "home" / "runs")
    assert locate_existing("runs", "--model").path == empty_output("runs").path == expected
    (tmp_path / "home" / "runs" / "file").touch()
    with pytest.raises(RequestError, match="is not empty"):
        empty_output("runs")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense://x/y", "there is no storage nonsense://, but s3://, gs:// and abfs://"),
        ("/tmp/caf\udce9", "holds control characters, or is not UTF-8"),
        ("/tmp/a\0b", "holds control characters, or is not UTF-8"),
    ],
)
def test_a_path_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"^--output {text}: {said}"):
        locate(text, "--output")


KEYS = """
s3://AKIA:topsecret@b/in s3://AKIA:top/secret@b/in s3://topsecret@b/in
s3://AKIA:0/topsecret@b/in s3://AKIA:/topsecret@b/in s3//AKIA:topsecret@b
s3://AKIA:topsecret%40b/in s3://AKIA:topsecret@[x/y s3://b/in?key=topsecret s3://b/in?region=x&topsecret
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
    assert [text for text in KEYS.split() if not may_hold_keys(text)] == []
    assert [text for text in NO_KEYS.split() if may_hold_keys(text)] == []


FLAGS = {
    "train": "--data --storage-path --config --name --epochs --nonsense",
    "score": "--model --input --output --config",
    "export-pairs": "--data --output --config",
    "predict": "--model --config",
}
"""Those that may be given a URI."""


def test_a_uri_with_a_key_is_refused_by_each_flag_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before Ray is joined, whose table of jobs has the command line; alike in config files."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("connected to Ray"))
    monkeypatch.chdir(tmp_path)
    uri = KEYS.split()[0]
    requests = [f"predict {uri} --number 5", f"train {uri}"]
    for command, flags in FLAGS.items():
        requests += [f"{command} {flag} {uri}" for flag in flags.split()]
    texts = {"a.yaml": f"data: {uri}", "b.yaml": f"epochs: {uri}", "c.yaml": f"x: {uri}: ]"}
    for name, text in texts.items():
        Path(name).write_text(text)
        requests.append(f"train --config {name}")
    for request in requests:
        assert cli.main(request.split()) == 2
        said = capfd.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1), request
        assert re.search("keys belong in the env|is not YAML|no such flag", said.err), request
        assert not re.search("topsecret|AKIA", said.err)
    assert len(list(tmp_path.iterdir())) == 3, "nothing is written"
