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
from mnistsum_ray.config import JobConfig, PathText, field_help
from mnistsum_ray.errors import RequestError, TextAsked, did_you_mean, one_line, shortened
from mnistsum_ray.storage.uri import PathOrUri, masked

Config = TypeVar("Config", bound=JobConfig)

_METAVARS: Final = {str: "TEXT", PathText: "TEXT", int: "N", float: "X", bool: "{true,false}", tuple[int, int]: "MIN,MAX"}
"""What `--help` shows in place of a value of a type."""

_POSITIONAL: Final = "picture"
"""The field that is given without a flag."""


def parse(config_class: type[Config], argv: list[str], description: str, command: str = "") -> Config:
    """Make a config from the command line and from the YAML file of `--config`; `command` is for the usage line.

    Raises:
        RequestError: an unknown flag or key, a value of the wrong type or out of range, an unreadable file.
        TextAsked: the text of `--help`, `--version` or `--print-config`.
    """
    parser = make_parser(config_class, description, command, show_all="--help-all" in argv)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag, parser._option_string_actions)
        raise RequestError(f"{shortened(flag)}: there is no such flag{hint} (--help-all lists them)")
    flags = vars(parsed)
    file, print_config, _ = (flags.pop(name, None) for name in ("config", "print_config", "json"))
    values = (_read_yaml(file) if file else {}) | flags
    try:
        if not print_config:
            return config_class(**values)
        raise TextAsked(_config_yaml(config_class, values))
    except ValidationError as error:
        raise RequestError(_message(error, config_class, flags)) from None


class Parser(argparse.ArgumentParser):
    """Argument parser that raises RequestError or TextAsked instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{shortened(message)} (--help lists the flags)")

    def _print_message(self, message: str, file: Any = None) -> None:
        raise TextAsked(message.rstrip("\n"))


def make_parser(config_class: type[JobConfig], description: str, command: str, *, show_all: bool) -> Parser:
    """Parser of the fields of a config. Most values stay text, which pydantic converts and checks as it does those of YAML.

    `--help` shows the description, the usage line with the command, and with `show_all` not just the flags of every day.
    """
    everyday = config_class.everyday
    picture = f"{_flag(_POSITIONAL)} " if _POSITIONAL in config_class.model_fields else ""
    parser = Parser(
        usage=f"{command} {picture}[flags]",
        add_help=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for heading, fields in _groups(config_class):
        group = parser.add_argument_group(heading)
        for name, field in fields:
            shown = show_all or not everyday or name in everyday
            text = field_help(field).replace("%", "%%") if shown else argparse.SUPPRESS
            if name == _POSITIONAL:
                group.add_argument(name, help=text, nargs="?", metavar=_flag(name))
            elif field.annotation is bool:
                group.add_argument(_flag(name), help=text, action=argparse.BooleanOptionalAction)
            elif field.annotation == bool | Literal["auto"]:
                group.add_argument(_flag(name), help=text, metavar="auto", nargs="?", const=True)
            elif field.annotation == tuple[PathText, ...]:  # several words, as a shell expands `*.parquet`
                group.add_argument(_flag(name), help=text, metavar="PATH", nargs="*", action="extend")
            else:
                group.add_argument(_flag(name), help=text, metavar=_metavar(field.annotation))
    group = parser.add_argument_group("Other")
    file = "YAML file with any of these settings; the command line wins"
    group.add_argument("--config", type=Path, metavar="FILE", help=file)
    group.add_argument("--print-config", action="store_true", help="print all settings as YAML, for --config")
    group.add_argument("--json", action="store_true", help="print the result as JSON on a terminal too")
    group.add_argument("--version", action="version", version=f"mnistsum_ray {__version__}", help="print the version")
    group.add_argument("-h", "--help", action="help", help="print the flags of every day" if everyday else "print all flags")
    group.add_argument("--help-all", action="help", help="print all flags" if everyday else argparse.SUPPRESS)
    return parser


def completion(shell: str, command: str, configs: dict[str, type[JobConfig]]) -> str:
    """Script that completes the flags of a command and their values; `configs` are those of its subcommands."""
    import shtab

    parser = argparse.ArgumentParser(command)
    commands = parser.add_subparsers()
    for name, config_class in configs.items():
        flags = make_parser(config_class, "", "", show_all=True)
        for action in flags._actions:
            field = config_class.model_fields.get(action.dest)
            action.choices = _literals(field.annotation) or None if field else None
            if action.dest == "config" or (field and PathText in (field.rebuild_annotation(), *get_args(field.annotation))):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(name, parents=[flags], add_help=False, help=name)  # shtab leaves out those without help
    return str(shtab.complete(parser, shell))


def _groups(config_class: type[JobConfig]) -> Iterator[tuple[str, Iterable[tuple[str, FieldInfo]]]]:
    """The fields of a config by group; the heading of a group is the first line of the docstring of its class."""

    def heading(field: tuple[str, FieldInfo]) -> str:
        group = next(base for base in config_class.__mro__ if field[0] in inspect.get_annotations(base))
        return (group.__doc__ or "").splitlines()[0].rstrip(".")

    return groupby(config_class.model_fields.items(), heading)


def _literals(annotation: Any) -> list[str]:
    """Words that a field takes."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return []
    return [word for kind in get_args(annotation) for word in (("true", "false") if kind is bool else _literals(kind))]


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_metavar(kind) for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    return _METAVARS[annotation]


def _flag(field: str) -> str:
    return field.upper() if field == _POSITIONAL else f"--{field.replace('_', '-')}"


def _config_yaml(config_class: type[JobConfig], values: dict[str, Any]) -> str:
    """All settings as YAML, each below its description: the given values, else the defaults."""
    required = {name for name, field in config_class.model_fields.items() if field.is_required() and name not in values}
    complete: dict[str, Any] = values | dict.fromkeys(required, "0")
    config = config_class(**complete)
    settings = config.model_dump(mode="json")
    lines = []
    for heading, fields in _groups(config_class):
        lines += ["", f"# {heading}"]
        for name, field in fields:
            lines += ["", *textwrap.wrap(field.description or "", 98, initial_indent="# ", subsequent_indent="# ")]
            value = yaml.safe_dump(settings[name], default_flow_style=True, width=1_000).partition("\n...")[0].strip()
            if isinstance(text := getattr(config, name), PathOrUri) and text.has_keys:
                value += "  # without its keys, which belong in the environment"
            lines.append(f"# {name}:  (required)" if name in required else f"{name}: {value}")
    return "\n".join(lines).strip()


class _YamlLoader(yaml.BaseLoader):
    """YAML whose values but null stay text, which pydantic converts as it does that of flags: YAML 1.1 reads 010 as 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_YamlLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Values of the config file by field name."""
    try:
        values = yaml.load(path.read_bytes(), _YamlLoader)
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such character
        raise RequestError(f"--config {path}: is not YAML: {shortened(one_line(error))}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"--config {path}: must hold `key: value` lines; the keys are the flags without dashes in front")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _message(error: ValidationError, config_class: type[JobConfig], flags: dict[str, Any]) -> str:
    """The missing settings, or else the first of pydantic's errors, as one line that names the flag or the config file's key."""
    missing = [_flag(str(entry["loc"][0])) for entry in error.errors() if entry["type"] == "missing"]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{', '.join(missing)}: {verb} required, on the command line or in the config file (--help has examples)"
    first = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not first["loc"]:
        # Validators put the names of fields in backticks, since `TrainConfig(...)` in Python has no flags.
        return re.sub(r"`([a-z_]+)`", lambda field: _flag(field[1]), message)
    key = str(first["loc"][0])
    place = _flag(key) if key in flags else f"key {key!r} of the config file"
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting{did_you_mean(key, config_class.model_fields)} (--help-all lists them)"
    if first["type"] == "too_short":
        return f"{place}: needs a value"
    hint = did_you_mean(str(first["input"]), _literals(config_class.model_fields[key].annotation))
    return f"{place}: {message[:1].lower()}{message[1:]}, got {shortened(masked(repr(first['input'])))}{hint}"
