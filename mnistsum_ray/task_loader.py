"""Find the class of a task by its name, and check it before anything runs.

A task is code. It is loaded because `--task` or `task=` names it, and never because a file does.
"""

import hashlib
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from mnistsum_ray.data.columns import Classes, Column
from mnistsum_ray.errors import RequestError, did_you_mean, one_line, shortened
from mnistsum_ray.task import BUILT_IN, Settings, Task

_PACKAGE = __name__.partition(".")[0]


def load_task(named: Any) -> type[Task]:
    """Return the class that `module:Class`, `file.py:Class` or a class itself names.

    RequestError: there is no such class, or it is no whole task.
    """
    if isinstance(named, type):
        found, shown = named, task_name(named)
    else:
        found, shown = _find(named), named
    if not issubclass(found, Task):
        raise RequestError(f"--task {shown}: is not a subclass of {_PACKAGE}.Task")
    problem = _problem(found)
    if problem:
        raise RequestError(f"--task {shown}: {problem}")
    return found


def task_name(task: type[Task]) -> str:
    """Return the text that names a class: `module:Class`, or `file.py:Class` of a file."""
    file = getattr(sys.modules.get(task.__module__), "__task_file__", None)
    return f"{file or task.__module__}:{task.__qualname__}"


def _find(text: str) -> type:
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise RequestError(f"--task {text}: must be file.py:Class or module:Class")
    if place.endswith(".py") and not Path(place).is_file():
        raise RequestError(f"--task {text}: there is no file {place}")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else import_module(place)
    except Exception as error:  # of anybody's code
        problem = f"{type(error).__name__}: {shortened(one_line(error))}"
        if isinstance(error, ModuleNotFoundError) and place.endswith(".py"):
            problem += "; install it, or put its folder on PYTHONPATH"
        raise RequestError(f"--task {text}: cannot be imported: {problem}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        hint = did_you_mean(name, vars(module))
        raise RequestError(f"--task {text}: there is no class {name} in {place}{hint}")
    return found


def _load_file(path: Path) -> ModuleType:
    """Return the module of a file; the same one each time while the file stays as it is."""
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    name = f"{path.stem}_{digest[:12]}"
    if name not in sys.modules:
        spec: Any = spec_from_file_location(name, path)
        module = module_from_spec(spec)
        module.__dict__["__task_file__"] = str(path)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def code_of(task: type[Task]) -> str:
    """Return what identifies a task's code: its file's SHA-256, or the built-in task's format.

    A class of a notebook has no file: empty.
    """
    if task.__module__.startswith(f"{_PACKAGE}."):
        return BUILT_IN
    file = Path(getattr(sys.modules.get(task.__module__), "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _problem(task: type[Task]) -> str | None:
    """Return why a class is not a complete task, or None."""
    if task.__abstractmethods__:
        return f"lacks the method {min(task.__abstractmethods__)}"
    wanted: dict[str, tuple[type, str]] = {
        "name": (str, "a text"),
        "inputs": (dict, "a dict of columns"),
        "labels": (dict, "a dict of columns"),
    }
    for name, (kind, meaning) in wanted.items():
        value = getattr(task, name, None)
        if not value or not isinstance(value, kind):
            return f"{name} is {shortened(repr(value))}, and must be {meaning}"
    if not (isinstance(task.Settings, type) and issubclass(task.Settings, Settings)):
        return f"Settings must be a subclass of {_PACKAGE}.Settings"
    columns = {**task.inputs, **task.labels}
    for key, column in columns.items():
        if not isinstance(column, Column):
            return f"column {key!r} is {shortened(repr(column))}, and must be Images, Integers, …"
    both = task.inputs.keys() & task.labels.keys()
    if both:
        return f"column {min(both)!r} is there twice, in inputs and in labels"
    if {"row_id", "reason", "path"} & columns.keys():
        return "no column may be row_id, reason or path, which the training adds"
    if not isinstance(task.outputs, pa.Schema) or not task.outputs.names:
        return "outputs must be a pyarrow.schema with a field or more"
    for field in task.outputs:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if pa.types.is_string(field.type):
            if isinstance(task.labels.get(field.name.removeprefix("pred_")), Classes):
                continue
            text = "may be text only if it is pred_LABEL of a label of Classes"
            return f"outputs has {field.name!r}, which {text}"
        if not is_number and not pa.types.is_boolean(kind):
            known = "an integer, a float, a bool, or pa.list_ of one"
            return f"outputs has {field.name!r} of type {field.type}, and must be {known}"
    if "reason" in task.outputs.names:
        return "outputs has 'reason', which scoring adds; rename it"
    return None
