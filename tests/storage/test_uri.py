"""Paths and URIs are resolved; one that holds a key is refused and shown nowhere."""

import re
from pathlib import Path

import pytest
import ray

from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError, TryAgainError
from mnistsum_ray.storage.uri import (
    empty_output,
    folder_lock,
    hide_secrets,
    locate,
    locate_existing,
    may_hold_secrets,
)


def test_a_path_or_uri_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = {
        "runs": tmp_path / "runs",
        "runs/../other": tmp_path / "other",
        "file:///a/b": "/a/b",
        "~": Path.home(),
        # A screenshot on macOS; French; Japanese.
        "/a/3.00\u202fPM 5\u00a0% \u3000.png": "/a/3.00\u202fPM 5\u00a0% \u3000.png",
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
    monkeypatch.setenv("HOME", str(tmp_path))
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0"
    for folder in (copy, tmp_path / "runs"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for found in (locate_existing("runs", "--model"), empty_output("runs")):
        assert found.path == str(tmp_path / "runs")


def test_a_path_is_refused_with_the_reason() -> None:
    said = "--output nonsense://x/y: there is no storage nonsense://, but s3://, gs:// and abfs://"
    with pytest.raises(RequestError, match=f"^{said}"):
        locate("nonsense://x/y", "--output")
    with pytest.raises(RequestError, match=r"^--output: is empty$"):  # of an unset variable
        locate("", "--output")


KEYS = """
s3://AKIA:topsecret@b/in s3://AKIA:top/secret@b/in s3://topsecret@b/in
s3:/AKIA:topsecret@b/in s3:/topsecret@b/in
s3://AKIA:0/topsecret@b/in s3://AKIA:/topsecret@b/in s3//AKIA:topsecret@b
s3://AKIA:topsecret@[x/y s3://b/in?key=topsecret s3://b/in?region=x&topsecret
s3://b/in?endpoint_override=http%3A%2F%2Fme%3Atopsecret%40h
abfs://account:topsecret@container/in abfs://container@a.dfs.core.windows.net/in?sig=topsecret
gs://anonymous@b/in gs://topsecret@b/in https://me:topsecret@host
"""

NO_KEYS = """
s3://b/a@b:c/*?region=x&scheme=http&endpoint_override=h:1&allow_bucket_creation=true
abfs://container@a.dfs.core.windows.net/in
/tmp/10:30@home ./10:30@home days/what?now=*
key=3/x.parquet s3://b/key=3/x /data/a,b;key=c&d/token.parquet
"""


def test_a_text_that_may_hold_a_key_is_known() -> None:
    assert [text for text in KEYS.split() if not may_hold_secrets(text)] == []
    assert [text for text in NO_KEYS.split() if may_hold_secrets(text)] == []


def test_user_info_is_cut_out_of_a_message() -> None:
    for uri in ("http://me:top/secret@h:1/x", "https://topsecret@h/x", "s3:/me:secret@b"):
        said = hide_secrets(f"cannot read {uri} (no answer); mail a@b, or go on")
        assert "secret" not in said
        assert re.fullmatch(r"cannot read \w+://?…@\S+ \(no answer\); mail a@b, or go on", said)
    for text in ("abfs://container@account/a", "http://127.0.0.1:80/x: a@b", "/a/b:c@d"):
        assert hide_secrets(text) == text


def test_one_run_holds_a_folder_on_a_disk_until_it_ends(tmp_path: Path) -> None:
    folder = locate(str(tmp_path / "deep" / "held"), "--name")
    said = r"^--name /.*/held: another run \(\S+:\d+\) is writing there; wait for it, or choose"
    for _ in range(2):
        with folder_lock(folder, "--name"), pytest.raises(TryAgainError, match=said):
            folder_lock(folder, "--name").__enter__()
    cannot = locate("/etc/passwd/out", "--name")
    with pytest.raises(RequestError, match=r"^--name /etc/\S+: cannot be written: Not a directory"):
        folder_lock(cannot, "--name").__enter__()


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
        command += " picture.png" * (command == "predict")
        requests += [f"{command} {flag} {uri}" for flag in flags.split()]
    texts = {"a.yaml": f"data: {uri}", "b.yaml": f"epochs: {uri}", "c.yaml": f"x: {uri}: ]"}
    for name, text in texts.items():
        Path(name).write_text(text)
        requests.append(f"train --config {name}")
    for request in requests:
        assert cli.main(request.split()) == 2
        said = capfd.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1), request
        assert re.search("keys belong in the env|is not YAML|unknown flag", said.err), request
        assert not re.search("topsecret|AKIA", said.err)
    assert len(list(tmp_path.iterdir())) == 3, "nothing is written"
