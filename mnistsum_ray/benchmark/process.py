"""Run a job in a process of its own, and read the last line of its standard output."""

import json
import subprocess
import sys
import time
from typing import Any

from mnistsum_ray.errors import RunError

Measurement = dict[str, float]
"""Figures of one way, as mnistsum_ray/benchmark/README.md explains them."""


def run_job(*arguments: object, module: str = "mnistsum_ray", processes: int = 1) -> list[dict[str, Any]]:
    """Run `mnistsum`, or another module, as a user does, in several processes at once.

    Returns:
        Their last lines, each with a field `printed`: when it came, in seconds since 1970.

    Raises:
        RunError: one of them failed; it has said why.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    try:
        lines = [json.loads(next(iter(job.stdout or ()), "{}")) | {"printed": time.time()} for job in jobs]
        if any(job.wait() for job in jobs):
            raise RunError(f"{' '.join(command[2:])} failed; see its error above")
    finally:
        for job in jobs:
            job.kill()  # does nothing to one that has ended
    return lines
