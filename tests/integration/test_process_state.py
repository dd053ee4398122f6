"""A person who calls `fit` and `score` from Python finds the process as it was before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import ROOT

EVERY = 10

# `ray.init` sets it for a cluster that it starts. The app keeps it: see mnistsum_ray/cluster/ray_internals.py.
KEPT = {"os.environ: RAY_USAGE_STATS_ENABLED": [None, "0"]}


@pytest.mark.slow
def test_fit_and_score_leave_the_process_as_it_was(data: Path, tmp_path: Path) -> None:
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=100, files=1), print)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONBREAKPOINT"))}
    command = [sys.executable, "-m", "tests.integration.process_state_script", str(data), str(tmp_path / "in"), str(tmp_path)]
    # Ray overwrites the first of them, and the app the second while it trains.
    environment |= {"RAY_ADDRESS": "local", "PYTHONBREAKPOINT": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "50"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout)
    assert changes == {"import": {}, "fit": KEPT, "score": {}}
