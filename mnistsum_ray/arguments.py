"""Parse the command line, and the YAML file that it names, into a config."""

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mnistsum_ray import __version__
from mnistsum_ray.config import JobConfig
from mnistsum_ray.errors import RequestError, one_line, shortened

Config = TypeVar("Config", bound=JobConfig)

_METAVARS: Final = {
    str: "TEXT",
    int: "N",
    float: "X",
    bool: "{true,false}",
    tuple[int, int]: "MIN,MAX",
    tuple[str, ...]: "PATH",
}
"""What `--help` shows in place of a value of a type."""


def parse(config_class: type[Config], argv: list[str], description: str) -> Config:
    """Make a config from the command line and from the YAML file of `--config`.

    Raises:
        RequestError: an unknown flag or key, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`, `--version` or `--print-config`, which print instead.
    """
    flags = vars(_parser(config_class, description).parse_args(argv))
    file, print_config = flags.pop("config", None), flags.pop("print_config", False)
    values = (_read_yaml(file) if file else {}) | flags
    try:
        if not print_config:
            return config_class(**values)
        print(_config_yaml(config_class, values))
    except ValidationError as error:
        raise RequestError(_first_error(error, flags)) from None
    raise SystemExit(0)


class _Parser(argparse.ArgumentParser):
    """Argument parser that raises RequestError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{shortened(message)} (--help lists the flags)")


def _parser(config_class: type[JobConfig], description: str) -> _Parser:
    """Parser of the fields of a config. Most values stay text, which pydantic converts and checks as it does those of YAML."""
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of these settings; the command line wins")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, for --config, and end")
    parser.add_argument("--version", action="version", version=f"mnistsum_ray {__version__}")
    for heading, fields in _groups(config_class):
        group = parser.add_argument_group(heading)
        for name, field in fields:
            kind: dict[str, Any] = {"metavar": _metavar(field.annotation)}
            if field.annotation is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif field.annotation == tuple[str, ...]:
                kind |= {"nargs": "*", "action": "extend"}  # several words, as a shell expands `*.parquet`
            default = "required" if field.is_required() else f"default: {field.default}"
            # The text of a flag whose default is None gives its unset value in brackets.
            text = f"{field.description}{'' if field.default is None else f' ({default})'}"
            group.add_argument(_flag(name), help=text.replace("%", "%%"), **kind)
    return parser


def _groups(config_class: type[JobConfig]) -> Iterator[tuple[str, Iterable[tuple[str, FieldInfo]]]]:
    """The fields of a config by group; the heading of a group is the first line of the docstring of its class."""

    def heading(field: tuple[str, FieldInfo]) -> str:
        group = next(base for base in config_class.__mro__ if field[0] in inspect.get_annotations(base))
        return (group.__doc__ or "").splitlines()[0].rstrip(".")

    return groupby(config_class.model_fields.items(), heading)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_metavar(kind) for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    return _METAVARS[annotation]


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _config_yaml(config_class: type[JobConfig], values: dict[str, Any]) -> str:
    """All settings as YAML, each below its description: the given values, else the defaults."""
    required = {name for name, field in config_class.model_fields.items() if field.is_required() and name not in values}
    complete: dict[str, Any] = values | dict.fromkeys(required, "?")
    settings = config_class(**complete).model_dump(mode="json")
    lines = []
    for heading, fields in _groups(config_class):
        lines += ["", f"# {heading}"]
        for name, field in fields:
            lines += ["", *textwrap.wrap(field.description or "", 98, initial_indent="# ", subsequent_indent="# ")]
            value = yaml.safe_dump(settings[name], default_flow_style=True, width=1_000).partition("\n...")[0].strip()
            lines.append(f"# {name}:  (required)" if name in required else f"{name}: {value}")
    return "\n".join(lines).strip()


class _YamlLoader(yaml.SafeLoader):
    """YAML that refuses what YAML 1.1 reads otherwise than it looks: 1:30 as 90, 010 as 8, and the first of two equal keys."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        number: int | float = yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        if ":" in node.value or re.match(r"[-+]?0\w", node.value):
            raise yaml.YAMLError(f"{node.value} would be read as {number}: write a decimal number")
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


for _type in ("int", "float"):
    _YamlLoader.add_constructor(f"tag:yaml.org,2002:{_type}", _YamlLoader.construct_number)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Values of the config file by field name."""
    try:
        values = yaml.load(path.read_bytes(), _YamlLoader)
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror or one_line(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise RequestError(f"--config {path}: is not YAML: {shortened(one_line(error))}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"--config {path}: must hold `key: value` lines; the keys are the flags without dashes in front")
    if "config" in values:
        raise RequestError(f"--config {path}: a config file cannot name another one; take the key 'config' out")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _first_error(error: ValidationError, flags: dict[str, Any]) -> str:
    """The first of pydantic's errors as one line that names the flag or the key of the config file."""
    first = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not first["loc"]:
        # Validators put the names of fields in backticks, since `TrainConfig(...)` in Python has no flags.
        return re.sub(r"`([a-z_]+)`", lambda field: _flag(field[1]), message)
    key = str(first["loc"][0])
    place = _flag(key) if key in flags else f"key {key!r} of the config file"
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting (--help lists them)"
    if first["type"] == "missing":
        return f"{_flag(key)}: is required, on the command line or in the config file"
    if first["type"] == "too_short":
        return f"{place}: needs a value"
    return f"{place}: {message[:1].lower()}{message[1:]}, got {shortened(repr(first['input']))}"
