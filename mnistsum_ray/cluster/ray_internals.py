"""The private APIs of Ray that the cluster package needs, one function each. Read in Ray 2.60.0.

`tests/cluster/test_ray_internals.py` runs each of them against the installed Ray.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

SILENT_CORE: Final = ("RAY_BACKEND_LOG_LEVEL", "fatal")
"""Environment variable that keeps Ray's C++ code in a process from logging to its standard error."""


def last_cluster_address() -> str | None:
    """Return HOST:PORT of the cluster that `ray start` started last on this machine, running or not; None without one.

    `ray._private.utils.read_ray_address` (2.60.0) reads the file that `ray.init()` itself reads. The public way is `ray.init`,
    which takes minutes to report that this cluster has been killed.
    """
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address


def session_folder() -> str:
    """Return the folder of the connected cluster's logs and sockets on this machine.

    `ray._private.worker._global_node` (2.60.0) knows it. `ray.init` returns it too, but to the caller that has connected.
    """
    from ray._private.worker import _global_node

    folder: str = _global_node.get_session_dir_path()
    return folder


def reload_authentication() -> None:
    """Make Ray in this process read RAY_AUTH_MODE and the token again.

    Ray's C++ code caches both: `RayConfig` the mode, `AuthenticationTokenLoader` the token. Ray 2.60.0 refreshes the caches
    itself only where `ray.init` starts a cluster or finds one without an address; it has no public function for it.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def rejects_this_client(address: str) -> bool:
    """Return whether the cluster at HOST:PORT rejects this process for want of the right token.

    `ray._raylet.GcsClient` (2.60.0) asks the cluster for its id, which takes milliseconds. The public way is a `ray.init` that
    fails halfway.

    Raises:
        ray.exceptions.RayError: the cluster does not answer.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        return True
    return False


def autoscaler_limits() -> dict[str, int]:
    """Return the resources that the connected cluster can grow to, as its autoscaler's configuration says; empty without one.

    `ray._private.state.state.get_max_resources_from_cluster_config` (2.60.0) is what Ray Data and Ray Train call for it.
    `ray.autoscaler.sdk`, the public module, only requests resources.
    """
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def start_autoscaling_coordinator() -> None:
    """Start the actor that Ray Train's controller asks for resources, and do not wait for it.

    `get_or_create_autoscaling_coordinator` (2.60.0) is what the controller calls. Its process takes seconds to start. The driver
    can read the data meanwhile, but the controller can only wait. There is no public function for it.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    get_or_create_autoscaling_coordinator()


@contextmanager
def ray_processes_started_by(start: Callable[..., Any]) -> Iterator[None]:
    """Have `ray.init` start the processes of a new cluster with this function while the block runs.

    `ray._private.services.ConsolePopen` (2.60.0) starts all of them. `ray.init` has no parameter for their session or process
    group.

    Args:
        start: takes Ray's own subclass of Popen and the arguments that Ray calls it with; returns the process.
    """
    from ray._private import services

    popen = services.ConsolePopen

    def start_with_logs(*args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> Any:
        # `connect` silences its own process only: the cluster's logs stay as they are.
        environment = dict(item for item in (env or os.environ).items() if item != SILENT_CORE)
        return start(popen, *args, env=environment, **kwargs)

    services.ConsolePopen = start_with_logs
    try:
        yield
    finally:
        services.ConsolePopen = popen
