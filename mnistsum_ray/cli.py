"""The command `mnistsum`, which the files in `jobs/` run too: its jobs, their last line, exit codes and signals."""

import gc
import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, TextIO

from mnistsum_ray import __version__
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
"""75: the same command may work later, so that Kubernetes, cron and Airflow can tell it from a typo."""

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

# The docstring of a command is its --help. Each imports what it needs: not before `run` catches signals, and for --help or a
# wrong flag neither NumPy, torch nor Ray.


def train(config: "TrainConfig") -> Result:
    """Train the two-head MNIST network, which predicts the digit of an image and
    the sum digit + number.

        mnistsum train                   full MNIST if it is found, else a sample
        mnistsum train --data sample     takes a minute on a laptop
        mnistsum train --name mine --resume auto    begins, or goes on after a kill
        mnistsum train --config runs/mine/config.yaml     trains the same again
        mnistsum train --data s3://B/mnist --num-workers 4 --storage-path s3://B/r
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
    OUTPUT/predictions/ has each input file's columns except the image, and
    pred_digit, digit_prob, pred_sum, sum_prob and consistent, with --probabilities
    also those of all classes; OUTPUT/rejected/ the rows that cannot be scored, with
    the reason. OUTPUT/manifest.json, written last, has the totals.
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

    output, source = pairs.export_pairs(config, Console().say)
    Console().say(f"{counted(config.rows, 'row')} of {source.name} in {counted(config.files, 'file')}: {output.display}")
    return {"output": output.display, "data": source.name, "split": config.split, "rows": config.rows, "files": config.files}


def export_model(config: "ExportModelConfig") -> Result:
    """Export a model to ONNX (model.onnx), for programs without this package.

        mnistsum export-model --model runs/mine --output exported/

    It takes images uint8[n, 28, 28] and numbers int64[n], and returns pred_digit,
    digit_prob, pred_sum and sum_prob. The file's answers in ONNX Runtime are
    compared with the model's before it is written. Needs the extra onnx.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise RequestError(f"ONNX export needs packages that are not installed ({', '.join(missing)}): pip install -e '.[onnx]'")

    from mnistsum_ray.export import model  # imports torch, which takes seconds: after the checks
    from mnistsum_ray.reporting.console import Console

    line = model.export_model(config, Console().say)
    Console().say(f"written: {line['output']}")
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
    from mnistsum_ray.model.heads import HEADS, PROBABILITY_FIELDS, SUM
    from mnistsum_ray.predicting import predict as predict_picture
    from mnistsum_ray.reporting.console import Console

    say, found = Console().say, predict_picture(config.model, config.picture, config.number)
    asked = {head.name: head.name for head in HEADS} | {SUM.name: f"digit + {found.number}"}
    answers = (f"{what}: {getattr(found, name)} ({percent(getattr(found, f'{name}_prob'))})" for name, what in asked.items())
    say(", ".join(answers))
    if found.unsure:
        say("unsure: the digit's probability is below 90 %")
    arrays = ("pixels", *PROBABILITY_FIELDS.names)
    return {"picture": config.picture} | {key: value for key, value in vars(found).items() if key not in arrays}


COMMANDS: Final[dict[str, tuple[Callable[[Any], Result], str, str]]] = {
    "train": (train, "TrainConfig", "train the network"),
    "score": (score, "ScoreConfig", "score Parquet files with a trained model"),
    "export-pairs": (export_pairs, "ExportPairsConfig", "write example input for scoring"),
    "export-model": (export_model, "ExportModelConfig", "write a model for programs without this package"),
    "predict": (predict, "PredictConfig", "answer for one picture and a number"),
}
"""What a command runs, the class of its config, and its meaning."""

_COMMAND_LINES: Final = "\n".join(f"  {name:<14}{meaning}" for name, (*_, meaning) in COMMANDS.items())
_USAGE: Final = f"""usage: mnistsum COMMAND [flags], or mnistsum COMMAND --help

{_COMMAND_LINES}

  --version     print the version"""


def main(argv: list[str] | None = None) -> int:
    """Run a command, given by its name and flags, or as this process was; return its exit code."""
    _open_standard_streams()
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        return run(partial(_run_command, command), flags)
    if command in ("-h", "--help", "help"):
        return _answer(_USAGE, sys.stdout)
    if command == "--version":
        return _answer(f"mnistsum_ray {__version__}", sys.stdout)
    if may_hold_keys(command):
        command = "this"
    _say(f"error: {command}: there is no such command{did_you_mean(command, COMMANDS)} (mnistsum --help lists them)")
    return BAD_REQUEST


def _run_command(name: str, argv: list[str]) -> Result:
    from mnistsum_ray import config
    from mnistsum_ray.arguments import parse

    command, kind, _ = COMMANDS[name]
    flags = [word for word in argv if word != "--json"]  # which is for `run`
    made = parse(getattr(config, kind), flags, f"{inspect.getdoc(command)}\n{_HELP}", shell_command(name))
    reserve_stdout_for_result()
    return command(made)


def run(job: Callable[[list[str]], Result], argv: list[str]) -> int:
    """Run a job and return its exit code. Its result is the last line on standard output, an error one line on standard error.

    SIGINT, SIGTERM and SIGHUP stop the job: one line says how to go on, and the exit code is 128 plus the number of the signal.
    Afterwards the process should exit: a later signal ends it at once, and 20 s later it ends by itself.
    """
    _open_standard_streams()
    stdout = sys.stdout
    try:
        with StopOnSignals(_say) as stop:
            try:
                code = _run(job, argv, stdout, stop)
            except KeyboardInterrupt as interrupt:
                with defer_signals():
                    code = _explain_stop(interrupt, stop)
                    stop.end(code)
            stop.end(code)
            if "mnistsum_ray.cluster.connection" in sys.modules:  # without that module there is no connection
                from mnistsum_ray.cluster.connection import disconnect

                disconnect()
    finally:
        sys.stdout = stdout  # only now: until they are disconnected, Ray's threads may print after the result
        _write("", sys.stderr)  # lines that could not be written: Python would try again at its end, and exit with 120
        gc.freeze()  # at its end Python would search a million objects of PyTorch and Ray for cycles, 0.7 s
    return code


def reserve_stdout_for_result() -> None:
    """Send to standard error what is printed from here to the end of `run`, since Ray's threads print at any time."""
    sys.stdout = sys.stderr


def _run(job: Callable[[list[str]], Result], argv: list[str], stdout: TextIO, stop: StopOnSignals) -> int:
    try:
        result = job(argv)
        with defer_signals():  # once the result is printed, a signal no longer changes the exit code
            if "--json" in argv or not stdout.isatty():
                error = _write(json.dumps(result, allow_nan=False) + "\n", stdout)
                if error:
                    closed = isinstance(error, BrokenPipeError)
                    why = "was closed by its reader" if closed else f"cannot be written ({error.strerror})"
                    raise RunError(f"standard output {why}, so the result could not be printed")
            stop.end(DONE)
        return DONE
    except TextAsked as asked:
        return _answer(str(asked), stdout)
    except (RequestError, RunError) as error:
        _say(f"error: {error}")
        if isinstance(error, TryAgainError):
            return TRY_AGAIN
        return BAD_REQUEST if isinstance(error, RequestError) else FAILED


def _explain_stop(interrupt: KeyboardInterrupt, stop: StopOnSignals) -> int:
    """Say what is kept, and how to go on; return the exit code."""
    reason: BaseException | None = interrupt
    while reason is not None and not isinstance(reason, RunInterrupted | RunError):
        reason = reason.__context__  # the job's own error, if a further interrupt came during its cleanup and replaced it
    nothing_begun = "nothing was begun, and the same command begins again"
    _say(f"stopped by {stop.received.name if stop.received else 'SIGINT'}; {reason or nothing_begun}")
    return stop.exit_code


def _say(text: str) -> None:
    """Write a line to standard error. If its reader has closed it, only the exit code tells of the error."""
    _write(f"{printable(text)}\n", sys.stderr)


def _answer(text: str, stdout: TextIO) -> int:
    """Print a text that was asked for, whose reader may close the pipe early, as `head` does; return the exit code."""
    error = _write(f"{text}\n", stdout)
    if error is None or isinstance(error, BrokenPipeError):
        return DONE
    _say(f"error: standard output cannot be written ({error.strerror})")
    return FAILED


def _write(text: str, stream: TextIO) -> OSError | None:
    """Write at once; if the stream's reader has closed it, or the disk is full, return the error, and drop what comes later."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _redirect_to_devnull(stream.fileno())
        return error
    return None


def _open_standard_streams() -> None:
    """Open closed standard streams on /dev/null: else the next file that is opened would receive what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _redirect_to_devnull(number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _redirect_to_devnull(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
