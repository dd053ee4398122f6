"""Command line and config file of a command: tyro splits the words, pydantic checks the values."""

import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import make_dataclass
from inspect import formatannotation
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import tyro
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from mnistsum_ray.config import JobConfig
from mnistsum_ray.errors import RequestError, TextAsked, did_you_mean, one_line, shortened
from mnistsum_ray.storage.uri import KEYS_REFUSED, may_hold_keys

Config = TypeVar("Config", bound=JobConfig)

_UNSET: Final = "\0"  # the value of a flag that is not given: no word of a command line can be so
_METAVARS: Final = {
    "bool": "true|false",
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "tuple[int, int]": "MIN,MAX",
}
_CONFIG_HELP: Final = "YAML file with any of these settings; flags win"


def parse(kind: type[Config], argv: list[str], description: str, command: str = "") -> Config:
    """Make a config from the command line and the YAML file of `--config`; the command line wins.

    Raises:
        RequestError: an unknown flag or key, an invalid value, an unreadable file.
        TextAsked: the text of `--help`: the description, then the flags of the command.
    """
    config = FieldInfo(annotation=str, default=None, description=_CONFIG_HELP)
    fields = kind.model_fields | {"config": config}
    words: Any = make_dataclass("Words", [_flag_of(name, field) for name, field in fields.items()])
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as box:
        try:
            parsed, unknown = tyro.cli(words, prog=command, args=argv, return_unknown_args=True)
        except SystemExit as end:
            if end.code:
                text = re.sub("[╭╮╰╯│─]|-{4,}", " ", box.getvalue())
                raise RequestError(" ".join(text.split())) from None
            raise TextAsked(f"{description}\n{out.getvalue().rstrip()}") from None
    if unknown:
        flag = shortened(unknown[0].partition("=")[0])
        if may_hold_keys(flag):
            raise RequestError(f"a path or URI {KEYS_REFUSED}")
        hint = did_you_mean(flag, map(_flag, fields))
        raise RequestError(f"{flag}: there is no such flag{hint} (--help lists them)")
    flags = {name: value for name, value in vars(parsed).items() if value not in (_UNSET, ())}
    if "input" in flags:
        flags["input"] = sum(flags["input"], ())  # one tuple for each time that the flag is given
    file = flags.pop("config", None)
    try:
        return kind(**(_read_yaml(file) if file else {}) | flags)
    except ValidationError as error:
        raise RequestError(_message(error.errors(), kind, flags)) from None


def _flag_of(name: str, field: FieldInfo) -> tuple[str, Any, Any]:
    """A flag, for `make_dataclass`. Its value stays text, which pydantic converts and checks."""
    pattern = r"'\w+'|tuple\[int, int\]|\b(?:bool|int|float|str)\b"
    types = re.findall(pattern, formatannotation(field.annotation))
    hint = f"(default: {field.default})"
    if field.is_required():
        hint = "(required)"
    elif field.default is None:
        hint = ""  # the description says what it means
    shown = tyro.conf.arg(
        metavar="|".join(_METAVARS.get(kind, kind.strip("'")) for kind in types),
        help=" ".join((field.description or "").split()),
        help_behavior_hint=hint,
    )
    if name == "input":  # several words, as a shell expands `*.parquet`, and the flag again
        return name, Annotated[tuple[tuple[str, ...], ...], shown, tyro.conf.UseAppendAction], ()
    if name == "picture":
        return name, Annotated[str, shown, tyro.conf.Positional], _UNSET
    if "bool" in types:
        return name, Annotated[str, shown, _TRUE_OR_WORD], _UNSET
    return name, Annotated[str, shown], _UNSET


_TRUE_OR_WORD: Final = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="",
    instance_from_str=lambda words: " ".join(words) or "true",  # a bare flag says true
    is_instance=lambda _: True,
    str_from_instance=lambda _: [],
)


def _flag(field: str) -> str:
    return "PICTURE" if field == "picture" else f"--{field.replace('_', '-')}"


def _read_yaml(path: str) -> dict[str, Any]:
    """Values of the config file by field name, as text: YAML 1.1 would read 010 as 8."""
    if may_hold_keys(path):
        raise RequestError(f"--config: {KEYS_REFUSED}")
    try:
        with Path(path).open("rb") as file:  # errors quote a text, and with it keys, but no stream
            values = yaml.load(file, yaml.BaseLoader)
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: it is not UTF-8
        problem = shortened(one_line(error))
        raise RequestError(f"--config {path}: is not YAML: {problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"--config {path}: must hold `key: value` lines, keys as flags")
    named = {key.replace("-", "_"): value for key, value in values.items()}
    return {name: None if value in ("", "~", "null") else value for name, value in named.items()}


def _message(errors: list[Any], kind: type[JobConfig], flags: dict[str, Any]) -> str:
    """One line on the missing settings, or else on pydantic's first error, with the flag or key."""
    missing = [_flag(error["loc"][0]) for error in errors if error["type"] == "missing"]
    if missing:
        where = "on the command line or in the config file (--help has examples)"
        return f"{', '.join(missing)}: required, {where}"
    place = errors[0]["loc"][:1]
    said = [error["msg"] for error in errors if error["loc"][:1] == place]  # a union has several
    texts = [text.removeprefix("Value error, ") for text in said]
    message = ", or ".join(text[:1].lower() + text[1:] for text in texts)
    if not place:  # validators write `field`, since `TrainConfig(...)` in Python has no flags
        return re.sub(r"`([a-z_]+)`", lambda field: _flag(field[1]), message)
    name = _flag(place[0]) if place[0] in flags else f"key {place[0]!r} of the config file"
    if errors[0]["type"] == "extra_forbidden":
        hint = did_you_mean(place[0], kind.model_fields)
        return f"{name}: there is no such setting{hint} (--help lists them)"
    return f"{name}: {message}, got {shortened(repr(errors[0]['input']))}"
