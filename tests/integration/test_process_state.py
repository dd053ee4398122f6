"""The README's example in Python runs, and leaves the process as it was before.

`python -m tests.integration.test_process_state CODE` runs it, and prints the changes as a JSON line.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from ray.data import DataContext

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs

ROOT = Path(__file__).parents[2]

# `ray.init` sets it for a cluster that it starts. The app keeps it: see mnistsum_ray/cluster/workarounds.py.
KEPT = {"os.environ: RAY_USAGE_STATS_ENABLED": [None, "0"]}


@pytest.mark.slow
def test_the_readmes_example_leaves_the_process_as_it_was(tmp_path: Path, write_rows: Callable[[int], Path]) -> None:
    text = (ROOT / "README.md").read_text().partition("## From Python")[2]
    written, smaller = 'data="sample", epochs=2)', f'data="{write_rows(500)}", epochs=1, sum_head_steps=5)'
    code = text.partition("```python\n")[2].partition("```")[0].replace(written, smaller)
    assert smaller in code
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "pairs"), rows=100, files=1), print)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONBREAKPOINT"))}
    # Ray overwrites the first of them, and the app the second while it trains.
    environment |= {"RAY_ADDRESS": "local", "PYTHONBREAKPOINT": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "50"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.integration.test_process_state", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pred_sum" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == KEPT
    assert (tmp_path / "scored-again" / "manifest.json").exists()


Snapshot = dict[str, dict[str, Any]]


def snapshot() -> Snapshot:
    loggers = logging.root.manager.loggerDict.items()
    return {
        "os.environ": dict(os.environ),
        "DataContext": {name: repr(value) for name, value in vars(DataContext.get_current()).items()},
        "loggers": {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger)},
        "sys": {name: repr(getattr(sys, name)) for name in ("stdout", "stderr", "excepthook", "path")},
        "signal handlers": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "matplotlib": {name: repr(value) for name, value in matplotlib.rcParams.items()},
        "other": {
            "working folder": str(Path.cwd()),
            "warnings": repr(warnings.filters),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
            "random state": torch.random.initial_seed(),
        },
    }


def changes(before: Snapshot, after: Snapshot) -> dict[str, list[Any]]:
    """Each value that differs, as [before, after]. Loggers that a library has created meanwhile do not count."""
    return {
        f"{what}: {name}": [before[what].get(name), after[what].get(name)]
        for what in before
        for name in (before[what] if what == "loggers" else before[what] | after[what])
        if before[what].get(name) != after[what].get(name)
    }


def main(code: str) -> None:
    # A change that an import of a library makes is not the app's doing.
    ours = ("api", "cli", "predicting", "scoring.driver", "training.driver")
    libraries = ("aiohttp.web", "mlflow", "pandas", "ray.autoscaler.sdk", "tensorboardX")
    for module in (*libraries, *(f"mnistsum_ray.{name}" for name in ours)):
        import_module(module)
    before = snapshot()
    exec(code, {})
    print(json.dumps(changes(before, snapshot())))


if __name__ == "__main__":
    main(sys.argv[1])
