"""The reaper ends what a killed job has started, and does no harm when it has died itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnistsum_ray.cluster.reaper import Reaper


def test_processes_start_also_when_the_reaper_has_died() -> None:
    reaper = Reaper()
    reaper._process.kill()
    reaper._process.wait()
    assert subprocess.run(["true"], preexec_fn=reaper.register_from_child, check=False).returncode == 0
    reaper.end()


def test_the_sessions_of_a_killed_job_are_ended() -> None:
    code = (
        "import subprocess; from mnistsum_ray.cluster.reaper import Reaper; reaper = Reaper(); "
        "child = subprocess.Popen(['sleep', '100'], start_new_session=True, preexec_fn=reaper.register_from_child); "
        "print(child.pid, flush=True); input()"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    child = int(job.stdout.readline())
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 15
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
