"""Connect this process to a Ray cluster, or start one; disconnect without leaving a process behind."""

import logging
import os
import sys
from contextlib import nullcontext

from mnistsum_ray.cluster.address import check_address, speaks_grpc
from mnistsum_ray.cluster.authentication import ensure_token, use_token_if_required
from mnistsum_ray.cluster.local_cluster import check_machine, end_local_cluster, mark_session, ray_processes_in_own_sessions
from mnistsum_ray.cluster.process_state import discard_stderr, hide_working_folder, preserve_environment, preserve_ray_log_level
from mnistsum_ray.cluster.ray_internals import SILENT_CORE, last_cluster_address
from mnistsum_ray.cluster.signals import preserve_signal_handlers
from mnistsum_ray.errors import RequestError, root_cause


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; without one, start one. Idempotent.

    The environment, the signal handlers, the working folder and the level of Ray's logger are afterwards what they were before.

    Raises:
        RequestError: no cluster answers at RAY_ADDRESS, or no cluster can be started here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    named_address = None if address in (None, "", "auto", "local") else address
    if named_address:
        check_address(named_address)

    import ray  # takes a second, so an address that is wrong is reported first

    # `ray.init` takes minutes to find out that the last cluster of this machine has been killed, so it is asked here.
    joined = address or last_cluster_address()
    starts_cluster = address == "local" or (not address and (joined is None or not speaks_grpc(joined)))
    if starts_cluster:
        check_machine()
    try:
        with preserve_environment():
            if starts_cluster:
                ensure_token()
            elif named_address:
                use_token_if_required(named_address)
            _init_ray(starts_cluster)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        problem = "Ray cannot be started here" if starts_cluster else f"the Ray cluster at {joined} cannot be joined"
        if joined == "auto":
            problem = "RAY_ADDRESS=auto: no running cluster was found"
        raise RequestError(f"{problem}: {root_cause(error)}") from error


def _init_ray(starts_cluster: bool) -> None:
    import ray

    # Ray's C++ code in this process logs lines that no user can follow: one on its log level, one for each pool of actors.
    # What fails is raised as well.
    os.environ.setdefault(*SILENT_CORE)
    sessions = ray_processes_in_own_sessions() if starts_cluster else nullcontext()
    with preserve_signal_handlers(), preserve_ray_log_level(), hide_working_folder(), sessions, discard_stderr():
        ray.init(
            address="local" if starts_cluster else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False,  # a new cluster starts seconds earlier without it; a joined one keeps its own
        )
    if starts_cluster:
        mark_session()


def disconnect(*, keep_logs: bool = False) -> None:
    """Disconnect from the cluster. A cluster that this process has started ends with all of its processes, and its logs go."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    end_local_cluster(keep_logs=keep_logs)
