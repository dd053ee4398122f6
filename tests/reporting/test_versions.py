"""Versions for the manifest."""

from pathlib import Path

import pytest

from mnistsum_ray.reporting.versions import versions


@pytest.mark.slow
def test_a_git_that_does_not_answer_costs_the_commit_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nsleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert {"python", "mnistsum_ray", "ray", "torch"} <= versions().keys() - {"commit"}
