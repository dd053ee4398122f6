"""Run a command where Ray has renamed what cluster/ray_internals.py uses: `python -m tests.cluster.without_private_names train`.

Ray itself needs these names, so they are hidden from that module and its helper alone. The last line on standard error tells
which it has asked for.
"""

import sys
from types import FunctionType, ModuleType
from typing import Any

import ray
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.metrics import Metric

from mnistsum_ray import cli, overrides
from mnistsum_ray.cluster import ray_internals

HIDDEN = {
    ray._private.services: ["ConsolePopen"],
    ray._private.state: ["state"],
    ray._private.utils: ["get_entrypoint_name", "read_ray_address"],
    ray._private.worker: ["listen_error_messages"],
    ray._raylet: ["AuthenticationTokenLoader", "GcsClient"],
}
_asked: set[str] = set()


def _refuse(name: str) -> None:
    if sys._getframe(2).f_code.co_filename in (ray_internals.__file__, overrides.__file__):
        _asked.add(name)
        raise AttributeError(name)


class _Hiding(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        if any(module is self and name in names for module, names in HIDDEN.items()):
            _refuse(name)
        return super().__getattribute__(name)


class _HiddenMethod:
    def __init__(self, kind: type, name: str) -> None:
        self.name, self.method = name, vars(kind)[name]
        setattr(kind, name, self)

    def __get__(self, instance: object, kind: type) -> Any:
        _refuse(self.name)
        return self.method.__get__(instance, kind)


def _rename(kind: type, name: str) -> None:
    """Rename a method, and where the others of its class call it."""
    for function in list(vars(kind).values()):
        if isinstance(function, FunctionType):
            names = tuple(f"{used}_" if used == name else used for used in function.__code__.co_names)
            function.__code__ = function.__code__.replace(co_names=names)
    setattr(kind, f"{name}_", vars(kind)[name])
    delattr(kind, name)


if __name__ == "__main__":
    for module in HIDDEN:
        module.__class__ = _Hiding
    _HiddenMethod(Metric, "_record")
    _rename(DataParallelTrainer, "_register_sigint_handler")
    code = cli.main(sys.argv[1:])
    print(*sorted(_asked), file=sys.stderr)
    sys.exit(code)
