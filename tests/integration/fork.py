"""A fork of the package: a copy in which an engineer has changed some lines, run as a user runs it."""

import shutil
from pathlib import Path
from typing import Any

from tests.integration.conftest import ROOT


def fork(folder: Path, *edits: tuple[str, str, str]) -> dict[str, Any]:
    """Copy the package into a folder and edit the copy; return the options with which `run_job` runs its jobs there.

    An edit is a file of the package (`model/heads.py`), a text that it holds exactly once, and the new text.
    """
    shutil.copytree(ROOT / "mnistsum_ray", folder / "mnistsum_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in edits:
        path = folder / "mnistsum_ray" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
    return {"cwd": folder, "env": {"PYTHONPATH": str(folder)}}
