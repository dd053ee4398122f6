"""The command `mnistsum`, which the files in `jobs/` run too: last line, exit codes, signals."""

import gc
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, TextIO

from mnistsum_ray import __version__
from mnistsum_ray.cluster.connection import disconnect
from mnistsum_ray.cluster.stop import StopOnSignals, defer_signals
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    RunInterrupted,
    TextAsked,
    TryAgainError,
    counted,
    did_you_mean,
    printable,
    shell_command,
)
from mnistsum_ray.storage.uri import may_hold_keys

if TYPE_CHECKING:
    from mnistsum_ray.config import ExportModelConfig, ExportPairsConfig, PredictConfig, ScoreConfig, TrainConfig

DONE: Final = 0
FAILED: Final = 1
BAD_REQUEST: Final = 2
TRY_AGAIN: Final = os.EX_TEMPFAIL
"""75: the same command may work later; Kubernetes, cron and Airflow can tell it from a typo."""

_HELP: Final = """
The value of an unset flag is in brackets below; a bare flag that takes true or
false says true. Standard output gets one JSON object, the result; a terminal
gets it with --json only. All else goes to standard error. Exit codes: 0 done, 2
the request is invalid, 75 try again later (no resources in time, no cluster, a
folder that another run holds), 128 + N stopped by signal N, 1 anything else.
"""
"""What `--help` says of every command."""

Result = dict[str, Any]
"""The fields of the last line."""

Job = Callable[[list[str]], Result]

# The docstring of a command is its --help. Each imports what it needs: not before `run` catches
# signals, and for --help or a wrong flag neither NumPy, torch nor Ray.


def train(config: "TrainConfig") -> Result:
    """Train the two-head MNIST network, which predicts the digit of an image and
    the sum digit + number.

        mnistsum train                   full MNIST if it is found, else a sample
        mnistsum train --data sample     takes a minute on a laptop
        mnistsum train --name mine --resume auto    begins, or goes on after a kill
        mnistsum train --config runs/mine/config.yaml     trains the same again
        ray job submit --working-dir . -- python jobs/train.py --data sample
    """
    from mnistsum_ray.api import fit

    return fit(config).line()


def score(config: "ScoreConfig") -> Result:
    """Score Parquet files with a trained model: predict the digit and the sum of each
    row, and account for every row.

        mnistsum score --model runs/mine --input pairs/ --output scored/
        mnistsum score --model M --input 'days/*/*.parquet' late.parquet --output O
        mnistsum score --model s3://B/runs/mine --input s3://B/in --output s3://B/o
        ray job submit -- python jobs/score.py --model M --input I --output O

    The same command continues after a kill, and adds input files that are new.
    OUTPUT/predictions/ has one row for each input row; a reason where it cannot be
    scored. OUTPUT/manifest.json, written last, has the totals.
    """
    from mnistsum_ray import api

    result = api.score(config)
    return result.line(labels=config.label_column is not None)


def export_pairs(config: "ExportPairsConfig") -> Result:
    """Write example input for scoring: Parquet files of MNIST images, each with a
    number and the true digit.

        mnistsum export-pairs --output pairs/
        mnistsum export-pairs --data mnist --output pairs/ --rows 2000000 --files 9
    """
    from mnistsum_ray.export import pairs
    from mnistsum_ray.reporting.console import Console

    console = Console()
    output, source = pairs.export_pairs(config, console.say)
    rows, files = counted(config.rows, "row"), counted(config.files, "file")
    console.say(f"{rows} of {source.name} in {files}: {output.display}")
    written = {"output": output.display, "data": source.name}
    return written | {"split": config.split, "rows": config.rows, "files": config.files}


def export_model(config: "ExportModelConfig") -> Result:
    """Export a model to ONNX (model.onnx), for programs without this package.

        mnistsum export-model --model runs/mine --output exported/

    It takes images uint8[n, 28, 28] and numbers int64[n], and returns pred_digit,
    digit_prob, pred_sum and sum_prob. The file's answers in ONNX Runtime are
    compared with the model's before it is written. Needs the extra onnx.
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


def predict(config: "PredictConfig") -> Result:
    """Look at one picture of a handwritten digit: which digit is it, and what is
    digit + number?

        mnistsum predict seven.png --number 5 --model runs/mine

    The picture may have any size, with ink darker or lighter than its background,
    and nothing else on it. It is prepared as MNIST's own were: made grey, cropped
    to the ink, scaled to fit 20 x 20 pixels and centred in 28 x 28. Where the
    digit's probability is below 90 %, a line says that the answer is unsure. No Ray
    is started.
    """
    from mnistsum_ray.errors import percent
    from mnistsum_ray.predicting import predict as predict_picture
    from mnistsum_ray.reporting.console import Console

    found, console = predict_picture(config.model, config.picture, config.number), Console()
    digit, total = percent(found.digit_prob), percent(found.sum_prob)
    console.say(f"digit: {found.digit} ({digit}), digit + {found.number}: {found.sum} ({total})")
    if found.unsure:
        console.say("unsure: the digit's probability is below 90 %")
    shown = [field.name for field in fields(found) if field.repr]  # no arrays
    return {"picture": config.picture} | {name: getattr(found, name) for name in shown}


COMMANDS: Final[dict[str, tuple[Callable[[Any], Result], str, str]]] = {
    "train": (train, "TrainConfig", "train the network"),
    "score": (score, "ScoreConfig", "score Parquet files with a trained model"),
    "export-pairs": (export_pairs, "ExportPairsConfig", "write example input for scoring"),
    "export-model": (export_model, "ExportModelConfig", "write a model for other programs"),
    "predict": (predict, "PredictConfig", "answer for one picture and a number"),
}
"""What a command runs, the class of its config, and its meaning."""

_USAGE: Final = "usage: mnistsum COMMAND [flags], or mnistsum COMMAND --help, or mnistsum --version\n\n"


def main(argv: list[str] | None = None) -> int:
    """Run a command, given by name and flags, or as this process was; return its exit code."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        return run(partial(_run_command, command), flags)
    if command in ("-h", "--help", "help"):
        lines = "".join(f"  {name:<14}{meaning}\n" for name, (*_, meaning) in COMMANDS.items())
        return _write(_USAGE + lines, sys.stdout)
    if command == "--version":
        return _write(f"mnistsum_ray {__version__}\n", sys.stdout)
    if may_hold_keys(command):
        command = "this"
    hint = did_you_mean(command, COMMANDS)
    _say(f"error: {command}: there is no such command{hint} (mnistsum --help lists them)")
    return BAD_REQUEST


def _run_command(name: str, argv: list[str]) -> Result:
    from mnistsum_ray import config
    from mnistsum_ray.arguments import parse

    command, kind, _ = COMMANDS[name]
    flags = [word for word in argv if word != "--json"]  # which is for `run`
    description = f"{inspect.getdoc(command)}\n{_HELP}"
    return command(parse(getattr(config, kind), flags, description, shell_command(name)))


def run(job: Job, argv: list[str]) -> int:
    """Run a job, whose result is the last line on standard output; return its exit code.

    SIGINT, SIGTERM and SIGHUP stop it: one line says how to go on, and the code is 128 + signal.
    Then the process should exit: a later signal ends it at once, and 20 s later it ends by itself.
    """
    stdout = sys.stdout
    # What Ray's threads print at any time goes to standard error, until they are disconnected.
    with redirect_stdout(sys.stderr), StopOnSignals(_say) as stop:
        try:
            code = _run(job, argv, stdout, stop)
        except KeyboardInterrupt as interrupt:
            with defer_signals():
                code = _explain_stop(interrupt, stop)
                stop.end(code)
        stop.end(code)
        disconnect()
    _write("", sys.stderr)  # what could not be written: Python would try again, and exit with 120
    gc.freeze()  # Python would search a million objects of PyTorch and Ray for cycles, 0.7 s
    return code


def _run(job: Job, argv: list[str], stdout: TextIO, stop: StopOnSignals) -> int:
    try:
        result = job(argv)
        code = DONE
        with defer_signals():  # once the result is printed, a signal no longer changes the code
            if "--json" in argv or not stdout.isatty():
                code = _write(json.dumps(result, allow_nan=False) + "\n", stdout)
            stop.end(code)
        return code
    except TextAsked as asked:
        return _write(f"{asked}\n", stdout)
    except (RequestError, RunError) as error:
        _say(f"error: {error}")
        if isinstance(error, TryAgainError):
            return TRY_AGAIN
        return BAD_REQUEST if isinstance(error, RequestError) else FAILED


def _explain_stop(interrupt: KeyboardInterrupt, stop: StopOnSignals) -> int:
    """Say what is kept, and how to go on; return the exit code."""
    reason: BaseException | None = interrupt
    # A further interrupt during the cleanup replaces the job's own error.
    while reason is not None and not isinstance(reason, RunInterrupted | RunError):
        reason = reason.__context__
    name = stop.received.name if stop.received else "SIGINT"
    _say(f"stopped by {name}; {reason or 'nothing was begun, and the same command begins again'}")
    return stop.exit_code


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
