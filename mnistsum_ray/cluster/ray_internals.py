"""Private APIs of Ray, one function each, and what `ray.init` does to this process. Read in Ray 2.60.0.

`tests/cluster/test_ray_internals.py` runs each of them against the installed Ray.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.cluster.stop import STOP_SIGNALS

_SILENT_CORE: Final = ("RAY_BACKEND_LOG_LEVEL", "fatal")
"""Environment variable that keeps Ray's C++ code in this process from writing lines that no user can follow, such as one for each
pool of actors. What fails is raised as well."""

_RAY_OPT_OUT: Final = "RAY_USAGE_STATS_ENABLED"
"""`ray.init` sets it to 0 for a cluster that it starts. It stays: without it Ray Data, in this process, would collect usage
statistics of every pipeline and look for a Prometheus server."""


def last_cluster_address() -> str | None:
    """Return HOST:PORT of the cluster that `ray start` started last on this machine, running or not; None without one.

    `ray._private.utils.read_ray_address` reads the file that `ray.init()` itself reads. The public way is `ray.init`, which takes
    minutes to report that this cluster has been killed.
    """
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address


def reload_authentication() -> None:
    """Make Ray in this process read RAY_AUTH_MODE and the token again.

    Ray's C++ code caches both: `RayConfig` the mode, `AuthenticationTokenLoader` the token. An earlier connection of this process
    may have left its own there. `ray.init` refreshes them in some cases only, and no public function does.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def rejects_this_client(address: str) -> bool:
    """Return whether the cluster at HOST:PORT rejects this process for want of the right token.

    `ray._raylet.GcsClient` asks the cluster for its id, which takes milliseconds. The public way is a `ray.init` that fails
    halfway.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        return True
    except RayError:  # `ray.init` fails for the same reason, and reports it
        return False
    return False


def has_dashboard() -> bool:
    """Return whether the connected cluster has Ray's dashboard.

    `ray._private.worker.get_dashboard_url` is what `ray.init` returns, to the caller alone, which may be a notebook.
    """
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())


def autoscaler_limits() -> dict[str, int]:
    """Return the resources that the connected cluster can grow to, as its autoscaler's configuration says; empty without one.

    `ray._private.state.state.get_max_resources_from_cluster_config` is what Ray Data and Ray Train call for it.
    `ray.autoscaler.sdk`, the public module, only requests resources.
    """
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def start_autoscaling_coordinator() -> None:
    """Start the actor that Ray Train's controller asks for resources, and do not wait for it.

    `get_or_create_autoscaling_coordinator` is what the controller calls. Its process takes seconds to start. The driver can read
    the data meanwhile, but the controller can only wait. There is no public function for it.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    get_or_create_autoscaling_coordinator()


@contextmanager
def ray_processes_in_own_sessions() -> Iterator[None]:
    """Have `ray.init` start the processes of a new cluster in sessions of their own, and all end with the driver, in the block.

    A closed terminal and `timeout` signal the whole process group. In the driver's group Ray's server would end before the job
    that still needs it. `ray._private.services.ConsolePopen` starts all processes; `ray.init` has no parameter for it.

    If the driver is killed, the kernel kills Ray's main processes with it (PR_SET_PDEATHSIG, which Ray sets on Linux), but the
    agents that the raylet has started stay for a minute, in which they try to report its end to the server that is gone too, and
    workers that are being started for half a minute. The raylet gets their commands from its command line: `setpriv` makes the
    kernel kill them with the raylet. Where it is missing or too old (before util-linux 2.33) they stay for that time.
    """
    from ray._private import services

    popen = services.ConsolePopen
    die_with_parent = [shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL"]
    try:
        subprocess.run([*die_with_parent, "true"], stderr=subprocess.DEVNULL, check=True)
        prefix = " ".join(die_with_parent) + " "
    except (OSError, subprocess.CalledProcessError):
        prefix = ""

    def start(command: list[str], *args: Any, env: dict[str, str] | None = None, preexec_fn: Any = None, **kwargs: Any) -> Any:
        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the driver blocks them during `ray.init`
            if preexec_fn is not None:
                preexec_fn()

        command = [re.sub(r"^(--\w+_command=)(?=.)", rf"\1{prefix}", argument) for argument in command]
        environment = dict(item for item in (env or os.environ).items() if item != _SILENT_CORE)  # the cluster's logs stay
        own_session = sys.platform == "linux"  # elsewhere Ray ends its processes by their process group
        return popen(command, *args, env=environment, preexec_fn=prepare, start_new_session=own_session, **kwargs)

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def side_effects_undone() -> Iterator[None]:
    """Undo after the block what `ray.init` changes in this process, and discard what it writes to standard error.

    - It overwrites PYTHONBREAKPOINT and sets variables such as RAY_AUTH_MODE in `os.environ`.
    - It sets the level of the logger `ray` for the whole process.
    - It puts the working folder first in the workers' import path: a `pandas.py` that lies beside the user's data would be
      executed in each worker. So it runs in another one, unless the working folder is in the import path of this process.
    - Ray's C++ code writes to file descriptor 2, for example when a token is rejected.
    - It starts a thread that prints errors of Ray's processes at any time, also below the job's last line, and with advice that
      does not hold ("there are infinite retries"). `listen_error_messages` is private. The jobs report what fails.
    """
    from ray._private import worker

    environment, logger, working_folder = dict(os.environ), logging.getLogger("ray"), Path.cwd()
    level = logger.level
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    os.environ.setdefault(*_SILENT_CORE)
    if not {"", str(working_folder)} & set(sys.path):
        os.chdir(Path(__file__).parents[2])
    listen, worker.listen_error_messages = worker.listen_error_messages, lambda *_: None
    try:
        yield
    finally:
        worker.listen_error_messages = listen
        os.chdir(working_folder)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
        logger.setLevel(level)
        for name in os.environ.keys() - environment.keys() - {_RAY_OPT_OUT}:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if name != _RAY_OPT_OUT})
