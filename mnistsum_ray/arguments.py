"""TODO arguments"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import (
    CliSettingsSource,
    SettingsError,
)

from mnistsum_ray.config import JobConfig
from mnistsum_ray.errors import RequestError, one_line, shortened

Config = TypeVar("Config", bound=JobConfig)


_MOST_YAML_BYTES: Final = 2**20


class _Loader(yaml.SafeLoader):
    """YAML without aliases: no config needs one, and a page of them stands for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in a config file")
        return super().compose_node(parent, index)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _expand_help(self, action: argparse.Action) -> str:
        # Such a flag's description says in brackets what it is when unset.
        return super()._expand_help(action).replace(" (default: None)", "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{shortened(message)} (--help lists the flags)")


def parse(config_class: type[Config], argv: list[str], description: str) -> Config:
    """Make a config of the command line and of the YAML file it names.

    Raises:
        RequestError: an unknown flag or key, a value of the wrong kind or out of range, an unreadable file.
    """
    argv = _gather_lists(argv, [name for name, field in config_class.model_fields.items() if field.annotation == tuple[str, ...]])
    parser = _Parser(prog=Path(sys.argv[0]).name, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    try:
        flags = CliSettingsSource[Any](config_class, root_parser=parser, cli_parse_args=argv)()
    except SettingsError as error:
        raise RequestError(shortened(one_line(error))) from None
    except RecursionError:
        raise RequestError("a flag's value is nested too deeply") from None
    values = _read_yaml(Path(flags["config"])) if flags.get("config") else {}
    try:
        return config_class(**(values | flags))
    except ValidationError as error:
        raise RequestError(_first_error(error, flags)) from None


def _gather_lists(argv: list[str], names: list[str]) -> list[str]:
    """Put the values of a list flag (`--input a b`, `--input a --input b`) into the one JSON list that pydantic reads.

    Its own syntax would split a file name at a comma, and not take what a shell makes of `--input pairs/*.parquet`.
    """
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            current = values.setdefault(flag, []) if flag[2:].replace("-", "_") in names else None
            if current is None:
                rest.append(word)
            elif equals:
                current.append(value)
        else:
            (rest if current is None else current).append(word)
    for flag, gathered in values.items():
        rest += [flag, json.dumps(gathered)]
    return rest


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_YAML_BYTES + 1)
        if len(text) > _MOST_YAML_BYTES:
            raise RequestError(f"--config {path}: is larger than {_MOST_YAML_BYTES:,} bytes, which no config file is")
        values = yaml.load(text.decode(), _Loader)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise RequestError(f"--config {path}: cannot be read: {shortened(said)}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"--config {path}: not YAML: {shortened(one_line(error))}") from None
    except RecursionError:
        raise RequestError(f"--config {path}: not YAML of a config: it is nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"--config {path}: must hold `key: value` lines, the keys being the flags without the dashes")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _first_error(error: ValidationError, flags: dict[str, Any]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return str(first["msg"]).removeprefix("Value error, ")
    key = str(first["loc"][0])
    place = f"--{key.replace('_', '-')}" if key in flags else f"key {key!r} of the config file"
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting (--help lists them)"
    if first["type"] == "missing":
        return f"--{key.replace('_', '-')}: is needed, and neither the command line nor the config file has it"
    if first["type"] == "too_short":
        return f"{place}: needs a value"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}, got {shortened(repr(first['input']))}"
