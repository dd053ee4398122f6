"""Private names of Ray, one function each, and what `ray.init` does to this process. Read in Ray 2.60.0.

Each works without its name too: by a public way, or without a comfort. ruff refuses private names in other modules, and here on
lines without a mark. `tests/cluster/test_ray_internals.py` runs each against the installed Ray, and with its name taken away.
"""

import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import ray
import ray.exceptions

from mnistsum_ray.overrides import replaced
from mnistsum_ray.storage.uri import masked

_GONE: Final = (ImportError, AttributeError, TypeError)
"""What Python raises where Ray has renamed something, or changed its parameters."""

_SILENT_CORE: Final = ("RAY_BACKEND_LOG_LEVEL", "fatal")
"""Keeps Ray's C++ code in this process from writing lines that no user can follow. What fails is raised as well."""

_RAY_OPT_OUT: Final = "RAY_USAGE_STATS_ENABLED"
"""`ray.init` sets it to 0 for a cluster that it starts. It stays: Ray Data would collect usage statistics of every pipeline."""

_DATA_ACTORS: Final = {
    "execution.node_trackers.actor_location": "get_or_create_actor_location_tracker",
    "cluster_autoscaler": "get_or_create_autoscaling_coordinator",
    "stats": "get_or_create_stats_actor",
    "stats_summary_actor": "_get_or_create_stats_summary_actor",
}
"""Functions that create detached actors, by their modules in `ray.data._internal`."""
_PACKAGE_PARENT: Final = str(Path(__file__).parents[2])

_CORE_LINE: Final = re.compile(rb"\[\d{4}-\d\d-\d\d [^\]]*\] .*?\w+\.(cc|h):\d+: ")
"""The beginning of a log line of Ray's C++ core."""

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.05


def last_cluster_address() -> str | None:
    """HOST:PORT of the cluster that `ray start` started last on this machine, running or not, which `ray.init` would join.

    Without the name None: a job joins the cluster of RAY_ADDRESS alone.
    """
    with suppress(*_GONE):
        return ray._private.utils.read_ray_address() or None  # noqa: TID251
    return None


def reload_authentication() -> None:
    """Make Ray in this process read RAY_AUTH_MODE and the token again.

    Ray's C++ code caches both, and `ray.init` does not always read them again. Without the names the first connection is right.
    """
    with suppress(*_GONE):
        ray._raylet.Config.initialize("")  # noqa: TID251
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()  # noqa: TID251


def rejects_this_client(address: str) -> bool:
    """Whether the cluster at HOST:PORT rejects this process for want of the right token.

    Without the name `ray.init` fails, and the user sets RAY_AUTH_MODE.
    """
    try:
        with suppress(*_GONE):
            ray._raylet.GcsClient(address=address)  # noqa: TID251
    except ray.exceptions.RayError as error:  # another one ends `ray.init` too, which reports it
        return isinstance(error, ray.exceptions.AuthenticationError)
    return False


def detached_data_actors() -> None:
    """Create Ray Data's detached actors on this node, which is the driver's.

    The first process that runs a Dataset creates them on its own node, and they stay for ever. Of a training that is a worker,
    whose node an autoscaler could then never remove. Without a name that node stays.
    """
    for module, name in _DATA_ACTORS.items():
        with suppress(*_GONE):
            getattr(import_module(f"ray.data._internal.{module}"), name)()


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources by the id of the node; without the name those of all nodes together, under no id."""
    with suppress(*_GONE):
        return dict(ray._private.state.state.available_resources_per_node())  # noqa: TID251
    return {"": ray.available_resources()}


def in_order(dataset: Any) -> Any:
    """A Dataset whose rows come in their order; the given one keeps its options, unless Ray cannot copy it."""
    with suppress(*_GONE):
        dataset = dataset.copy(dataset, _deep_copy=True)
    dataset.context.execution_options.preserve_order = True
    return dataset


class PatientExecution:
    """Callback of Ray Data that sleeps after steps of its scheduling loop in which no task was started or returned anything.

    When its consumer is slower than its tasks, Ray Data 2.60 runs its loop without a pause, in a thread of the training process.
    That takes a third of the speed of training on two cores, and Ray Data has no option against it.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._pause = _FIRST_PAUSE_SECONDS

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None  # the other hooks of Ray Data's `ExecutionCallback`, a private class

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each step, in the thread of the execution."""
        with suppress(*_GONE):
            metrics = [operator.metrics for operator in executor._topology]
            progress = [(metric.num_tasks_submitted, metric.num_task_outputs_generated) for metric in metrics]
            if progress != self._seen:
                self._seen, self._pause = progress, _FIRST_PAUSE_SECONDS
                return
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)


def job_config(metadata: dict[str, str] | None) -> ray.job_config.JobConfig:
    """This process as a job of Ray: the dashboard shows `metadata`, and workers get the import path of this process.

    Ray puts the working folder first in it, and a `pandas.py` that lies beside the user's data would be executed in each worker.
    So the folder of this package takes its place, unless the working folder is in the import path here too. Without the name it
    stays there.
    """
    config = ray.job_config.JobConfig(metadata=metadata)
    folder = str(Path.cwd())
    if {"", folder} & set(sys.path):
        return config
    with suppress(*_GONE):
        serialize = config._serialize

        def serialize_without_folder() -> Any:
            config._py_driver_sys_path = [_PACKAGE_PARENT if path == folder else path for path in config._py_driver_sys_path]
            return serialize()

        config._serialize = serialize_without_folder
    return config


@contextmanager
def small_cluster() -> Iterator[None]:
    """Have `ray.init` start a new cluster, in the block, with the processes alone that a job needs, in sessions of their own.

    - A closed terminal and `timeout` signal the whole process group, in which Ray's server would end before its job. If the
      driver is killed, the kernel kills Ray's main processes with it; two agents stay for a minute.
    - The dashboard's server, which Ray starts without a dashboard too, the autoscaler, which has nothing to scale, and what reads
      the logs of workers, which are not printed, are left out: Ray waits for the first when it starts, and for all at its end.
    """

    def start(popen: Any) -> Callable[..., Any]:
        def start_one(*args: Any, env: dict[str, str] | None = None, **options: Any) -> Any:
            environment = dict(item for item in (env or os.environ).items() if item != _SILENT_CORE)  # the cluster's logs stay
            options["start_new_session"] = sys.platform == "linux"  # elsewhere Ray ends its processes by their process group
            return popen(*args, env=environment, **options)

        return start_one

    def connect_quietly(connect: Any) -> Callable[..., Any]:
        def quietly(*args: Any, **options: Any) -> Any:
            with without_core_logs():
                return connect(*args, **options)

        return quietly

    with ExitStack() as replacements:
        replacements.enter_context(replaced(lambda: ray._private.worker, "connect", connect_quietly))  # noqa: TID251
        replacements.enter_context(replaced(lambda: ray._private.services, "ConsolePopen", start))  # noqa: TID251
        for name in ("start_api_server", "start_monitor", "start_log_monitor"):
            nothing = replaced(lambda: ray._private.node.Node, name, lambda _: lambda *_, **__: None)  # noqa: TID251
            replacements.enter_context(nothing)
        yield


@contextmanager
def side_effects_undone() -> Iterator[None]:
    """Undo after the block what `ray.init` changes in this process.

    - It sets variables in `os.environ`, and the level of the logger `ray`.
    - It starts a thread that prints errors of Ray's processes at any time, also below the job's last line: the jobs report them.
    - It gives the command line, whose URIs may hold keys, to the cluster, whose dashboard shows it.
    """
    environment = dict(os.environ)
    logger = logging.getLogger("ray")
    level = logger.level
    os.environ.setdefault(*_SILENT_CORE)
    try:
        with (
            replaced(lambda: ray._private.worker, "listen_error_messages", lambda _: lambda *_: None),  # noqa: TID251
            replaced(lambda: ray._private.utils, "get_entrypoint_name", lambda name: lambda: masked(name())),  # noqa: TID251
        ):
            yield
    finally:
        logger.setLevel(level)
        for name in os.environ.keys() - environment.keys() - {_RAY_OPT_OUT}:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if name != _RAY_OPT_OUT})


@contextmanager
def without_core_logs() -> Iterator[None]:
    """Keep log lines of Ray's C++ core off standard error. What others write there meanwhile follows at the end of the block."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not _CORE_LINE.match(line):
                    os.write(2, line)
