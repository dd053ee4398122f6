"""The command `mnistsum`, which the files in `jobs/` run too.

Flags and config file: argparse splits the words, and pydantic checks the values. Then signals, the
last line and exit codes: see `run`.
"""

import gc
import inspect
import json
import os
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter, _ArgumentGroup
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar, cast, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mnistsum_ray import __version__
from mnistsum_ray.config import JobConfig, ScoreConfig, TaskConfig, TrainConfig, flag_name
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    TryAgainError,
    counted,
    did_you_mean,
    one_line,
    percent,
    printable,
    shell_command,
    shortened,
    spelled,
)
from mnistsum_ray.mnist.pairs import ExportPairsConfig
from mnistsum_ray.mnist.picture import PredictConfig
from mnistsum_ray.storage.uri import as_request_error, hide_secrets, locate

_HELP: Final = """
Defaults are in brackets. A true/false flag without a value means true. The
result is one JSON object on standard output.
"""
"""What `--help` says of every command."""

_EXIT_CODES: Final = """
exit codes: 0 done; 2 correct the request; 75 try the same command later (no
free resources, cluster or storage; expired keys; a locked folder); 128 + N
stopped by signal N; 1 anything else
"""

_GROUPS: Final = {
    "most used": "picture number input model output data task name resume epochs num_workers "
    "storage_path seed max_rows recipe overwrite strict split rows files",
    "the data": "skip_bad_rows cache",
    "the job": "batch_size learning_rate weight_decay precision init_from max_failures",
    "the machine": "use_gpu threads wait_seconds",
    "the output": "probabilities max_rows_per_file",
    "the task's own": "",
}
"""Fields whose flags `--help` shows together, in this order; all other fields are the task's."""

Config = TypeVar("Config", bound=JobConfig)

Line = dict[str, Any]
"""The fields of the last line."""

# The docstring of a command is its --help. Each command imports what it needs, since --help and a
# wrong flag need neither torch nor Ray.


def train(config: TrainConfig) -> Line:
    """Train a network: without --task, for the digit of an image, and digit + number.

    mnistsum train --data sample                  half a minute on two cores
    mnistsum train --name mine --resume auto      starts or resumes a run
    mnistsum train --config runs/mine/config.yaml     trains the same again
    mnistsum train --task shapes.py:Shapes --data shapes/     your own task
    """
    from mnistsum_ray.api import fit

    return fit(config).line()


def score(config: ScoreConfig) -> Line:
    """Score Parquet files with a trained model, and account for every row.

    mnistsum score --model runs/mine --input pairs/ --output scored/
    mnistsum score --model M --input 'days/*/*.parquet' a.parquet --output s3://B/o

    The same command resumes after a kill, and scores new input files.
    OUTPUT/predictions/ has one row for each input row; OUTPUT/manifest.json, which
    is written last, has the totals.
    """
    from mnistsum_ray import api

    return api.score(config).line()


def export_pairs(config: ExportPairsConfig) -> Line:
    """Write example input for scoring: images of MNIST, with numbers and digits.

    mnistsum export-pairs --output pairs/
    """
    from mnistsum_ray.mnist import pairs

    output, source = pairs.export_pairs(config, _say)
    rows, files = counted(config.rows, "row"), counted(config.files, "file")
    _say(f"{rows} of {source.name} in {files}: {output.display}")
    settings = config.model_dump(include={"split", "rows", "files"})
    return {"output": output.display, "data": source.name, **settings}


def predict(config: PredictConfig) -> Line:
    """Look at a picture of a digit: which is it, and what is digit + number?

    mnistsum predict seven.png --number 5 --model runs/mine

    The picture may have any size, with ink darker or lighter than its background,
    and nothing else on it. Below a probability of 90 % a line says that the answer
    is unsure. No Ray is started.
    """
    from mnistsum_ray.mnist.picture import SURE
    from mnistsum_ray.mnist.picture import predict as predict_picture

    found = predict_picture(config.model, config.picture, config.number).line()
    texts = []
    for head, question in (("digit", "digit"), ("sum", f"digit + {config.number}")):
        texts.append(f"{question}: {found[head]} ({percent(found[f'{head}_prob'])})")
    _say(", ".join(texts))
    if found["unsure"]:
        _say(f"unsure: the digit's probability is below {100 * SURE:.0f} %")
    return {"picture": config.picture} | found


COMMANDS: Final[dict[str, tuple[Callable[[Any], Line], Any, str]]] = {
    "train": (train, TrainConfig, "train a network"),
    "score": (score, ScoreConfig, "score Parquet files with a trained model"),
    "export-pairs": (export_pairs, ExportPairsConfig, "write example input for scoring"),
    "predict": (predict, PredictConfig, "answer for one picture and a number"),
}
"""What a command runs, the class of its config, and its meaning."""


def main(argv: list[str] | None = None) -> int:
    """Run the command of `argv`, else that of this process; return its exit code."""
    words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = "".join(f"  {name:<14}{meaning}\n" for name, (*_, meaning) in COMMANDS.items())
    parser = Parser("mnistsum COMMAND", f"{commands}\nCOMMAND --help lists its flags")
    parser.add_argument("command", choices=COMMANDS, help=SUPPRESS)
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    parser.add_argument("--version", action="version", version=f"mnistsum_ray {__version__}")
    show_json = "--json" in words or not sys.stdout.isatty()
    try:
        name = parser.parse_args(words[:1]).command
        job, kind, _ = COMMANDS[name]
        config = config_from_args(
            kind, words[1:], f"{inspect.getdoc(job)}\n{_HELP}", shell_command(name)
        )
    except RequestError as error:
        return _explain(error, None)
    return run(partial(job, config), show_json)


class Parser(ArgumentParser):
    """A parser whose errors are RequestErrors. An unset flag has no value."""

    def __init__(self, command: str = "", description: str = "") -> None:
        super().__init__(
            add_help=False,  # `parse` adds it below the other flags
            prog=command,
            usage=f"{command} [flags]",
            description=description,
            epilog=_EXIT_CODES,
            formatter_class=RawDescriptionHelpFormatter,
            argument_default=SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise RequestError(hide_secrets(message).removeprefix("argument "))


def config_from_args(
    kind: type[Config], argv: list[str], description: str = "", command: str = ""
) -> Config:
    """Make a config from the command line and the YAML file of `--config`; the command line wins.

    The flags of a task's columns and settings follow from `--task`, which is looked for first.

    RequestError: an unknown flag or key, an invalid value, an unreadable file.
    SystemExit: `--help` is printed: the description, then the flags of the command.
    """
    if issubclass(kind, TaskConfig):
        first = Parser()
        first.add_argument("--task")
        named = vars(first.parse_known_args(argv)[0]).get("task")
        kind = cast(type[Config], kind.of_task(named))
    parser = Parser(command, description)
    listed = " ".join(_GROUPS.values()).split()
    of_task = [name for name in kind.model_fields if name not in listed]
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split() or of_task:
            if name in kind.model_fields:
                _add_flag(group, name, kind.model_fields[name])
    other = parser.add_argument_group("other")
    config_help = "YAML file with any of these settings; flags win"
    other.add_argument("--config", metavar="FILE", help=config_help)
    other.add_argument("--json", action="store_true", help="print the result on a terminal too")
    other.add_argument("-h", "--help", action="help", help="show this help and exit")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = shortened(hide_secrets(unknown[0]).partition("=")[0])
        hint = did_you_mean(flag, [*map(flag_name, kind.model_fields), "--config", "--json"])
        raise RequestError(f"{flag}: unknown flag{hint} (--help lists them)")
    flags = vars(given)
    flags.pop("json", None)  # see `main`
    file = flags.pop("config", None)
    settings = _read_yaml(file) if file is not None else {}
    if "task" in settings:
        advice = "give it as --task: no code is loaded because a file says so"
        raise RequestError(f"key 'task' of the config file: {advice}")
    return kind(**settings | flags)


def _add_flag(group: _ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add the flag of a field. Its value stays text, which pydantic converts and checks."""
    text = " ".join((field.description or "").split())
    if field.is_required():
        text += " (required)"
    elif field.default is not None:  # the text says what None means
        text += f" [{spelled(field.default)}]"
    annotation = field.annotation
    types = (annotation, *get_args(annotation))  # the type, and the members of a union
    literals = [one for one in types if get_origin(one) is Literal]
    choices = "|".join(word for literal in literals for word in get_args(literal))
    options: dict[str, Any] = {"help": text}
    if bool in types:  # --resume has the choice auto
        options |= {"nargs": "?", "const": "true", "metavar": choices or "true|false"}
    elif choices:
        options["metavar"] = choices
    elif get_origin(annotation) is tuple:  # several words, as a shell expands `*.parquet`
        options |= {"nargs": "+", "action": "extend"}  # the flag may be given again too
    if name == "picture":  # the one value that needs no flag
        group.add_argument(name, metavar="PICTURE", **options)
    else:
        group.add_argument(flag_name(name), **options)


def _read_yaml(path: str) -> dict[str, Any]:
    """Return the settings of the config file by field name."""
    place = locate(path, "--config")
    if place.is_local and Path(place.path).is_fifo():  # a shell makes one of `<(…)`
        _say(f"--config {path}: is a pipe, which is read until its writer closes it")
    with as_request_error("--config"):
        data = place.read_bytes()
    try:
        # Lists of aliases of lists of aliases would fill the memory as soon as one is shown.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(BytesIO(data))):
            raise RequestError(
                f"--config {path}: has an alias (*NAME); write out what it stands for"
            )
        # From a stream: errors about a string quote its lines, which may hold secrets.
        settings = yaml.safe_load(BytesIO(data)) or {}
        return {key.replace("-", "_"): value for key, value in settings.items()}
    except (
        yaml.YAMLError,
        AttributeError,
    ) as error:  # the latter: a list, or keys that are no text
        problem = f"is not YAML of `key: value` lines: {shortened(one_line(error))}"
        raise RequestError(f"--config {path}: {problem}") from None


def run(job: Callable[[], Line], show_json: bool) -> int:
    """Run a job, whose result is the last line on standard output; return its exit code.

    The first SIGINT, SIGTERM or SIGHUP stops it: a line says how to resume, and the code is 128 +
    signal. What follows is ignored: `timeout` sends its signal twice.
    """
    received: list[signal.Signals] = []
    # `nohup` ignores SIGHUP, and a script's `&` SIGINT.
    stop_signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]

    def interrupt(number: int, _: Any) -> None:
        if not received:
            received.append(signal.Signals(number))
            raise KeyboardInterrupt

    for number in stop_signals:
        signal.signal(number, interrupt)
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):  # what Ray's threads print at any time
        try:
            result = job()
            code = 0
        except (RequestError, RunError, KeyboardInterrupt) as error:
            code = _explain(error, received[0] if received else None)
        # The job is done, and a signal no longer changes its result.
        for number in stop_signals:
            signal.signal(number, signal.SIG_IGN)
        if code == 0 and show_json:
            print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # a cluster of this process ends with its processes
    gc.freeze()  # Python would search a million objects of PyTorch and Ray for cycles, 0.7 s
    return code


def _explain(error: BaseException, received: signal.Signals | None) -> int:
    """Say why the job has ended, and how to resume it; return the exit code."""
    text, code = f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        received = received or signal.SIGINT  # Ray Train's own handler has taken it
    if received:
        how = str(error) or "nothing was begun, and the same command begins again"
        text, code = f"stopped by {received.name}; {how}", 128 + received
    elif isinstance(error, RequestError):
        code = 2
    elif isinstance(error, TryAgainError):
        code = os.EX_TEMPFAIL  # 75: Kubernetes, cron and Airflow can tell it from a typo
    _say(printable(hide_secrets(text)))
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
