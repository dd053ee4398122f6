"""The command `mnistsum`, which the files in `jobs/` run too: last line, exit codes, signals."""

import gc
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any, Final, TextIO

from mnistsum_ray import __version__
from mnistsum_ray.arguments import parse
from mnistsum_ray.cluster.connection import disconnect
from mnistsum_ray.cluster.signals import StopOnSignals
from mnistsum_ray.config import (
    ExportModelConfig,
    ExportPairsConfig,
    PredictConfig,
    ScoreConfig,
    TrainConfig,
)
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    TextAsked,
    TryAgainError,
    counted,
    did_you_mean,
    percent,
    printable,
    shell_command,
)
from mnistsum_ray.storage.uri import may_hold_keys

DONE: Final = 0
FAILED: Final = 1
BAD_REQUEST: Final = 2
TRY_AGAIN: Final = os.EX_TEMPFAIL
"""75: the same command may work later; Kubernetes, cron and Airflow can tell it from a typo."""

_HELP: Final = """
The value of an unset flag is in brackets below; a bare flag that takes true or
false says true. Standard output gets one JSON object, the result; a terminal
gets it with --json only. Exit codes: 0 done, 2 the request is invalid, 75 try
again later (no resources in time, no cluster, a folder that another run holds),
128 + N stopped by signal N, 1 anything else.
"""
"""What `--help` says of every command."""

Result = dict[str, Any]
"""The fields of the last line."""

# The docstring of a command is its --help. Each imports what it needs: for --help or a wrong flag
# neither NumPy, torch nor Ray.


def train(config: TrainConfig) -> Result:
    """Train the two-head MNIST network: the digit of an image, and digit + number.

    mnistsum train --data sample                takes a minute on a laptop
    mnistsum train --name mine --resume auto    begins, or goes on after a kill
    mnistsum train --config runs/mine/config.yaml     trains the same again
    """
    from mnistsum_ray.api import fit

    return fit(config).line()


def score(config: ScoreConfig) -> Result:
    """Score Parquet files with a trained model, and account for every row.

    mnistsum score --model runs/mine --input pairs/ --output scored/
    mnistsum score --model M --input 'days/*/*.parquet' a.parquet --output s3://B/o

    The same command continues after a kill, and adds input files that are new.
    OUTPUT/predictions/ has one row for each input row; OUTPUT/manifest.json, which
    is written last, has the totals.
    """
    from mnistsum_ray import api

    return api.score(config).line()


def export_pairs(config: ExportPairsConfig) -> Result:
    """Write example input for scoring: images of MNIST, with numbers and digits.

    mnistsum export-pairs --output pairs/
    """
    from mnistsum_ray.export import pairs
    from mnistsum_ray.reporting.console import Console

    console = Console()
    output, source = pairs.export_pairs(config, console.say)
    rows, files = counted(config.rows, "row"), counted(config.files, "file")
    console.say(f"{rows} of {source.name} in {files}: {output.display}")
    written = {"output": output.display, "data": source.name}
    return written | {"split": config.split, "rows": config.rows, "files": config.files}


def export_model(config: ExportModelConfig) -> Result:
    """Export a model to ONNX (model.onnx), for programs without this package.

    mnistsum export-model --model runs/mine --output exported/

    It takes images uint8[n, 28, 28] and numbers int64[n], and returns pred_digit,
    digit_prob, pred_sum and sum_prob. Needs the extra onnx.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        install = f"not installed ({', '.join(missing)}): pip install -e '.[onnx]'"
        raise RequestError(f"ONNX export needs packages that are {install}")

    from mnistsum_ray.export import model  # imports torch, which takes seconds: after the checks
    from mnistsum_ray.reporting.console import Console

    console = Console()
    line = model.export_model(config, console.say)
    console.say(f"written: {line['output']}")
    return line


def predict(config: PredictConfig) -> Result:
    """Look at a picture of a digit: which is it, and what is digit + number?

    mnistsum predict seven.png --number 5 --model runs/mine

    The picture may have any size, with ink darker or lighter than its background,
    and nothing else on it. Below a probability of 90 % a line says that the answer
    is unsure. No Ray is started.
    """
    from mnistsum_ray.api import predict as predict_picture
    from mnistsum_ray.reporting.console import Console

    found, console = predict_picture(config.model, config.picture, config.number), Console()
    digit, total = percent(found.digit_prob), percent(found.sum_prob)
    console.say(f"digit: {found.digit} ({digit}), digit + {found.number}: {found.sum} ({total})")
    if found.unsure:
        console.say("unsure: the digit's probability is below 90 %")
    shown = [field.name for field in fields(found) if field.repr]  # no arrays
    return {"picture": config.picture} | {name: getattr(found, name) for name in shown}


COMMANDS: Final[dict[str, tuple[Callable[[Any], Result], Any, str]]] = {
    "train": (train, TrainConfig, "train the network"),
    "score": (score, ScoreConfig, "score Parquet files with a trained model"),
    "export-pairs": (export_pairs, ExportPairsConfig, "write example input for scoring"),
    "export-model": (export_model, ExportModelConfig, "write a model for other programs"),
    "predict": (predict, PredictConfig, "answer for one picture and a number"),
}
"""What a command runs, the class of its config, and its meaning."""

_USAGE: Final = "usage: mnistsum COMMAND [flags], or COMMAND --help, or --version"


def main(argv: list[str] | None = None) -> int:
    """Run a command, given by name and flags, or as this process was; return its exit code."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        return run(partial(_run_command, command), flags)
    if command in ("-h", "--help", "help"):
        lines = "".join(f"  {name:<14}{meaning}\n" for name, (*_, meaning) in COMMANDS.items())
        return _write(f"{_USAGE}\n\n{lines}", sys.stdout)
    if command == "--version":
        return _write(f"mnistsum_ray {__version__}\n", sys.stdout)
    if may_hold_keys(command):
        command = "this"
    hint = did_you_mean(command, COMMANDS)
    _say(f"error: {command}: there is no such command{hint} (mnistsum --help lists them)")
    return BAD_REQUEST


def _run_command(name: str, argv: list[str]) -> Result:
    command, kind, _ = COMMANDS[name]
    flags = [word for word in argv if word != "--json"]  # which is for `run`
    description = f"{inspect.getdoc(command)}\n{_HELP}"
    return command(parse(kind, flags, description, shell_command(name)))


def run(job: Callable[[list[str]], Result], argv: list[str]) -> int:
    """Run a job, whose result is the last line on standard output; return its exit code.

    SIGINT, SIGTERM or SIGHUP stops it: one line says how to go on, and the code is 128 + signal.
    """
    stdout, stop = sys.stdout, StopOnSignals()
    with redirect_stdout(sys.stderr):  # what Ray's threads print at any time
        try:
            result = job(argv)
            code = stop.exit_code = DONE  # once it is printed, a signal does not change the code
            if "--json" in argv or not stdout.isatty():
                code = _write(json.dumps(result, allow_nan=False) + "\n", stdout)
        except TextAsked as asked:
            code = _write(f"{asked}\n", stdout)
        except (RequestError, RunError, KeyboardInterrupt) as error:
            code = _explain(error, stop.received)
        stop.exit_code = code
        disconnect()
    _write("", sys.stderr)  # what could not be written: Python would try again, and exit with 120
    gc.freeze()  # Python would search a million objects of PyTorch and Ray for cycles, 0.7 s
    return code


def _explain(error: BaseException, received: signal.Signals | None) -> int:
    """Say why the job has ended, and how to go on; return the exit code."""
    if received or isinstance(error, KeyboardInterrupt):
        received = received or signal.SIGINT
        how = str(error) or "nothing was begun, and the same command begins again"
        _say(f"stopped by {received.name}; {how}")
        return 128 + received
    _say(f"error: {error}")
    if isinstance(error, TryAgainError):
        return TRY_AGAIN
    return BAD_REQUEST if isinstance(error, RequestError) else FAILED


def _say(text: str) -> None:
    """Write a line to standard error."""
    _write(f"{printable(text)}\n", sys.stderr)


def _write(text: str, stream: TextIO) -> int:
    """Write at once; return the exit code. The reader of a pipe may close it, as `head` does."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what comes later
        if not isinstance(error, BrokenPipeError):
            _say(f"error: standard output cannot be written ({error.strerror})")
            return FAILED
    return DONE
