"""Command line and config file of a command, made into its config: tyro splits the words, pydantic checks the values."""

import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import make_dataclass
from inspect import formatannotation
from io import BytesIO, StringIO
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
_METAVARS: Final = {"bool": "true|false", "int": "N", "float": "X", "str": "TEXT", "tuple[int, int]": "MIN,MAX"}
_CONFIG: Final = FieldInfo(annotation=str, default=None, description="YAML file with any of these settings; flags win")


def parse(config_class: type[Config], argv: list[str], description: str, command: str = "") -> Config:
    """Make a config from the command line and from the YAML file of `--config`, over which the command line wins.

    Raises:
        RequestError: an unknown flag or key, a value of the wrong type or out of range, an unreadable file.
        TextAsked: the text of `--help`: the description, then the flags of the command.
    """
    fields = config_class.model_fields | {"config": _CONFIG}
    flags_class: Any = make_dataclass("Flags", [_tyro_field(name, field) for name, field in fields.items()])
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as box:
        try:
            parsed, unknown = tyro.cli(flags_class, prog=command, args=argv, return_unknown_args=True)
        except SystemExit as end:
            if end.code:
                raise RequestError(" ".join(re.sub("[╭╮╰╯│─]|-{4,}", " ", box.getvalue()).split())) from None
            raise TextAsked(f"{description}\n{out.getvalue().rstrip()}") from None
    if unknown:
        flag = shortened(unknown[0].partition("=")[0])
        if may_hold_keys(flag):
            raise RequestError(f"a path or URI {KEYS_REFUSED}")
        raise RequestError(f"{flag}: there is no such flag{did_you_mean(flag, map(_flag, fields))} (--help lists them)")
    flags = {name: value for name, value in vars(parsed).items() if value not in (_UNSET, ())}
    if "input" in flags:
        flags["input"] = sum(flags["input"], ())  # one tuple for each time that the flag is given
    file = flags.pop("config", None)
    try:
        return config_class(**(_read_yaml(Path(file)) if file else {}) | flags)
    except ValidationError as error:
        raise RequestError(_message(error.errors(), config_class, flags)) from None


def _tyro_field(name: str, field: FieldInfo) -> tuple[str, Any, Any]:
    """A flag, for `make_dataclass`. Its value stays text, which pydantic converts and checks as it does that of YAML."""
    types = re.findall(r"'\w+'|tuple\[int, int\]|\b(?:bool|int|float|str)\b", formatannotation(field.annotation))
    metavar = "|".join(_METAVARS.get(kind, kind.strip("'")) for kind in types)
    hint = "(required)" if field.is_required() else f"(default: {field.default})"
    hint = "" if field.default is None else hint  # the description says what it means
    shown = tyro.conf.arg(metavar=metavar, help=" ".join((field.description or "").split()), help_behavior_hint=hint)
    if name == "input":  # several words, as a shell expands `*.parquet`, and the flag again
        return name, Annotated[tuple[tuple[str, ...], ...], shown, tyro.conf.UseAppendAction], ()
    if name == "picture":
        return name, Annotated[str, shown, tyro.conf.Positional], _UNSET
    if "bool" in types:  # a bare flag says true
        spec = PrimitiveConstructorSpec((0, 1), "", lambda words: " ".join(words) or "true", lambda _: True, lambda _: [])
        return name, Annotated[str, shown, spec], _UNSET
    return name, Annotated[str, shown], _UNSET


def _flag(field: str) -> str:
    return "PICTURE" if field == "picture" else f"--{field.replace('_', '-')}"


def _read_yaml(path: Path) -> dict[str, Any]:
    """Values of the config file by field name, as text: YAML 1.1 would read 010 as 8."""
    if may_hold_keys(str(path)):
        raise RequestError(f"--config: {KEYS_REFUSED}")
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise RequestError(f"--config {path}: is not a regular file")
    try:
        data = path.read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(BytesIO(data))):
            raise yaml.YAMLError("aliases are not taken; write the value again")
        node = yaml.compose(BytesIO(data), yaml.SafeLoader)  # errors quote a text, and with it keys, but no stream
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such character
        raise RequestError(f"--config {path}: is not YAML: {shortened(one_line(error))}") from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise RequestError(f"--config {path}: must hold `key: value` lines; the keys are flags without dashes")
    values: dict[str, Any] = {}
    for key, value in node.value if node else ():
        name = str(key.value).replace("-", "_")
        if name in values:
            raise RequestError(f"--config {path}: the key {name!r} is there twice")
        values[name] = value.value
        if isinstance(value, yaml.SequenceNode):
            values[name] = [item.value for item in value.value]
        elif value.tag.endswith(":null"):
            values[name] = None
    return values


def _message(errors: list[Any], config_class: type[JobConfig], flags: dict[str, Any]) -> str:
    """The missing settings, or else pydantic's first error, as one line that names the flag or the config file's key."""
    missing = [_flag(error["loc"][0]) for error in errors if error["type"] == "missing"]
    if missing:
        return f"{', '.join(missing)}: required, on the command line or in the config file (--help has examples)"
    place = errors[0]["loc"][:1]
    said = [error["msg"].removeprefix("Value error, ") for error in errors if error["loc"][:1] == place]
    message = ", or ".join(text[:1].lower() + text[1:] for text in said)  # a union has an error for each of its types
    if not place:  # validators write `field`, since `TrainConfig(...)` in Python has no flags
        return re.sub(r"`([a-z_]+)`", lambda field: _flag(field[1]), message)
    name = _flag(place[0]) if place[0] in flags else f"key {place[0]!r} of the config file"
    if errors[0]["type"] == "extra_forbidden":
        return f"{name}: there is no such setting{did_you_mean(place[0], config_class.model_fields)} (--help lists them)"
    return f"{name}: {message}, got {shortened(repr(errors[0]['input']))}"
