"""Command line and config file of a job: argparse splits the words, pydantic checks the values."""

import re
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from io import BytesIO
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mnistsum_ray.config import JobConfig
from mnistsum_ray.errors import RequestError, did_you_mean, one_line, shortened
from mnistsum_ray.storage.uri import KEYS_REFUSED, as_request_error, locate, may_hold_keys

Config = TypeVar("Config", bound=JobConfig)


class Parser(ArgumentParser):
    """Its errors are a RequestError. A flag that is not given has no value."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=command,
            usage=f"{command} [flags]",
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
            argument_default=SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        if any(map(may_hold_keys, re.split(r"[\s'=]+", message))):
            message = f"a path or URI {KEYS_REFUSED}"
        raise RequestError(message.removeprefix("argument "))


def parse(kind: type[Config], argv: list[str], description: str = "", command: str = "") -> Config:
    """Make a config from the command line and the YAML file of `--config`; the command line wins.

    Raises:
        RequestError: an unknown flag or key, an invalid value, an unreadable file.
        SystemExit: `--help` is printed: the description, then the flags of the command.
    """
    parser = Parser(command, description)
    for name, field in kind.model_fields.items():
        _add_flag(parser, name, field)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these settings; flags win"
    )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = shortened(unknown[0].partition("=")[0])
        if may_hold_keys(flag):
            parser.error(flag)
        hint = did_you_mean(flag, [*map(_flag, kind.model_fields), "--config"])
        raise RequestError(f"{flag}: there is no such flag{hint} (--help lists them)")
    flags = vars(given)
    file = flags.pop("config", None)
    settings = _read_yaml(file) if file else {}
    try:
        return kind(**settings | flags)
    except ValidationError as error:
        raise RequestError(_message(error.errors(), kind, flags)) from None


def _add_flag(parser: Parser, name: str, field: FieldInfo) -> None:
    """Add the flag of a field. Its value stays text, which pydantic converts and checks."""
    text = " ".join((field.description or "").split())
    if field.is_required():
        text += " (required)"
    elif field.default is not None:  # the text says what None means
        text += f" [{field.default}]"
    kind = field.annotation
    options: dict[str, Any] = {"help": text}
    if kind is bool or bool in get_args(kind):
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif get_origin(kind) is tuple:  # several words, as a shell expands `*.parquet`
        options |= {"nargs": "+", "action": "extend"}  # the flag may be given again too
    if name == "picture":  # the one value that needs no flag
        parser.add_argument(name, nargs="?", metavar="PICTURE", help=text)
        return
    parser.add_argument(_flag(name), **options)


def _flag(field: str) -> str:
    return "PICTURE" if field == "picture" else f"--{field.replace('_', '-')}"


def _read_yaml(path: str) -> dict[str, Any]:
    """Values of the config file by field name, as text: YAML 1.1 would read 010 as 8."""
    with as_request_error("--config"):
        data = locate(path, "--config").read_bytes()
    try:
        # As a stream: of a string PyYAML's errors quote lines, which may hold keys.
        values = yaml.load(BytesIO(data), yaml.BaseLoader)
    except yaml.YAMLError as error:
        problem = shortened(one_line(error))
        raise RequestError(f"--config {path}: is not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise RequestError(f"--config {path}: must hold `key: value` lines, keys as flags")
    settings = {}
    for key, value in values.items():
        if may_hold_keys(key):
            raise RequestError(f"--config: {KEYS_REFUSED}")
        settings[key.replace("-", "_")] = None if value in ("", "~", "null") else value
    return settings


def _message(errors: list[Any], kind: type[JobConfig], flags: dict[str, Any]) -> str:
    """One line on the missing settings, or else on the wrong ones, each by its flag or key."""
    missing = [_flag(error["loc"][0]) for error in errors if error["type"] == "missing"]
    if missing:
        where = "on the command line or in the config file (--help has examples)"
        return f"{', '.join(missing)}: required, {where}"
    errors_of: dict[str, list[Any]] = defaultdict(list)
    for error in errors:
        setting = error["loc"][0] if error["loc"] else ""
        errors_of[setting].append(error)
    return "; ".join(_problem(setting, errors_of[setting], kind, flags) for setting in errors_of)


def _problem(setting: str, errors: list[Any], kind: type[JobConfig], flags: dict[str, Any]) -> str:
    """What is wrong with a setting; where its type is a union, each type has an error."""
    texts = []
    for error in errors:
        text = error["msg"].removeprefix("Value error, ")
        texts.append(text[:1].lower() + text[1:])
    message = ", or ".join(texts)
    if not setting:  # validators write `field`, since `TrainConfig(...)` in Python has no flags
        return re.sub(r"`([a-z_]+)`", lambda field: _flag(field[1]), message)
    name = _flag(setting) if setting in flags else f"key {shortened(setting)!r} of the config file"
    if errors[0]["type"] == "extra_forbidden":
        hint = did_you_mean(setting, kind.model_fields)
        return f"{name}: there is no such setting{hint} (--help lists them)"
    return f"{name}: {message}, got {shortened(repr(errors[0]['input']))}"
