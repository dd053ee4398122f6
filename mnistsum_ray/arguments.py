"""Parse the command line and the YAML file that it names into a config."""

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from mnistsum_ray import __version__
from mnistsum_ray.config import JobConfig
from mnistsum_ray.errors import RequestError, one_line, shortened

Config = TypeVar("Config", bound=JobConfig)

_MAX_YAML_BYTES: Final = 2**20

_METAVARS: Final = {
    "Path": "FILE",
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "bool": "{true,false}",
    "tuple[str,...]": "PATH...",
    "{int,tuple[int,int]}": "N|MIN,MAX",
}
"""What `--help` shows in place of a Python type."""


def parse(config_class: type[Config], argv: list[str], description: str) -> Config:
    """Make a config from the command line and from the YAML file of `--config`.

    Raises:
        RequestError: an unknown flag or key, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`, `--version` or `--print-config`, which print instead.
    """
    parser = _Parser(config_class, description)
    list_fields = [name for name, field in config_class.model_fields.items() if field.annotation == tuple[str, ...]]
    argv, lists = _split_list_flags(argv, list_fields)
    try:
        source = CliSettingsSource[Any](
            config_class, root_parser=parser, cli_parse_args=argv, add_argument_method=_Parser.add_flag
        )
        flags = source() | lists
    except (SettingsError, RecursionError) as error:
        raise RequestError(shortened(one_line(error))) from None
    values = _read_yaml(Path(flags["config"])) if flags.get("config") else {}
    try:
        if parser.print_config:
            print(config_yaml(config_class, values | flags))
            raise SystemExit(0)
        return config_class(**(values | flags))
    except ValidationError as error:
        raise RequestError(_first_error(error, flags)) from None


class _Parser(argparse.ArgumentParser):
    """Argument parser that shows each flag under the group of its field, and raises RequestError instead of exiting."""

    def __init__(self, config_class: type[JobConfig], description: str) -> None:
        command = Path(sys.argv[0]).name
        super().__init__(
            prog=command, usage=f"{command} [flags]", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
        )
        self._config_class = config_class
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self.print_config = False
        self.add_argument("--version", action="version", version=f"mnistsum_ray {__version__}")
        self.add_argument(
            "--print-config", action=_PrintConfig, help="print all settings as YAML, which --config takes back, and end"
        )

    def add_flag(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add a flag to the group that declares its field; fields of JobConfig itself belong to no group."""
        field = names[0].lstrip("-").replace("-", "_")
        if "metavar" in kwargs:  # switches have none
            kwargs["metavar"] = _METAVARS.get(kwargs["metavar"], kwargs["metavar"])
        heading = _group(self._config_class, field)
        if heading is None:
            return self.add_argument(*names, **kwargs)
        if heading not in self._groups:
            self._groups[heading] = self.add_argument_group(heading)
        return self._groups[heading].add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{shortened(message)} (--help lists the flags)")


class _PrintConfig(argparse.Action):
    """Marks the parser; not a value of the namespace, in which every name must be a setting."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, _Parser)
        parser.print_config = True


def config_yaml(config_class: type[JobConfig], values: dict[str, Any]) -> str:
    """Return all settings as YAML, each below its description: the given values, else the defaults.

    Raises:
        ValidationError: a value is invalid.
    """
    required = {name for name, field in config_class.model_fields.items() if field.is_required() and name not in values}
    complete: dict[str, Any] = values | dict.fromkeys(required, "?")
    settings = config_class(**complete).model_dump(mode="json")
    lines, group = [], None
    for name, field in config_class.model_fields.items():
        if name == "config":
            continue
        if (heading := _group(config_class, name)) != group:
            group = heading
            lines += ["", f"# {group}"]
        lines += ["", *textwrap.wrap(field.description or "", 98, initial_indent="# ", subsequent_indent="# ")]
        value = yaml.safe_dump(settings[name], default_flow_style=True, width=1_000).partition("\n...")[0].strip()
        lines.append(f"# {name}:  (required)" if name in required else f"{name}: {value}")
    return "\n".join(lines).strip()


def _group(config_class: type[JobConfig], field: str) -> str | None:
    """Heading of the group that declares a field; fields of JobConfig itself belong to none."""
    declaring = next(base for base in config_class.__mro__ if field in inspect.get_annotations(base))
    return None if declaring is JobConfig else (declaring.__doc__ or declaring.__name__).splitlines()[0].rstrip(".")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _expand_help(self, action: argparse.Action) -> str:
        # The description of such a flag gives its unset value in brackets.
        return super()._expand_help(action).replace(" (default: None)", "")


def _split_list_flags(argv: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take the list flags (`--input a b`, `--input a --input b`) out of the arguments; return the others, and values by field.

    Pydantic's own syntax would split a file name at a comma, reject what a shell makes of `--input pairs/*.parquet`, and pass
    names through JSON, which escapes some characters.
    """
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    current = rest
    for word in argv:
        flag, equals, value = word.partition("=")
        field = flag[2:].replace("-", "_")
        if flag.startswith("--") and field in names:
            current = values.setdefault(field, [])
            current += [value] if equals else []
        else:
            current = rest if word.startswith("--") or word == "-h" else current
            current.append(word)
    return rest, values


class _YamlLoader(yaml.SafeLoader):
    """YAML that refuses what YAML 1.1 reads otherwise than it looks: 1:30 as 90, 010 as 8, and the first of two equal keys."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):
            raise yaml.YAMLError(f"{node.value} would be read as {super().construct_yaml_int(node)}: write a decimal number")
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:
            raise yaml.YAMLError(f"{node.value} would be read as {super().construct_yaml_float(node)}: write a decimal number")
        return float(super().construct_yaml_float(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_yaml_int)
_YamlLoader.add_constructor("tag:yaml.org,2002:float", _YamlLoader.construct_yaml_float)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Values of the config file by field name."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_YAML_BYTES)
        values = yaml.load(text, _YamlLoader)
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror or one_line(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise RequestError(f"--config {path}: is not YAML: {shortened(one_line(error))}") from None
    if len(text) == _MAX_YAML_BYTES:
        raise RequestError(f"--config {path}: is larger than {_MAX_YAML_BYTES:,} bytes, the limit for a config file")
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
    if not first["loc"]:
        # Validators put the names of fields in backticks, since `TrainConfig(...)` in Python has no flags.
        message = str(first["msg"]).removeprefix("Value error, ")
        return re.sub(r"`([a-z_]+)`", lambda field: f"--{field[1].replace('_', '-')}", message)
    key = str(first["loc"][0])
    place = f"--{key.replace('_', '-')}" if key in flags else f"key {key!r} of the config file"
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting (--help lists them)"
    if first["type"] == "missing":
        return f"--{key.replace('_', '-')}: is required, on the command line or in the config file"
    if first["type"] == "too_short":
        return f"{place}: needs a value"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}, got {shortened(repr(first['input']))}"
