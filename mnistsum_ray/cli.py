"""The command `mnistsum`, which the files in `jobs/` run too: last line, exit codes, signals."""

import gc
import inspect
import json
import os
import signal
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from types import FrameType
from typing import Any, Final

from mnistsum_ray import __version__
from mnistsum_ray.arguments import Parser, parse
from mnistsum_ray.config import ExportPairsConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    TryAgainError,
    counted,
    percent,
    printable,
    shell_command,
)
from mnistsum_ray.storage.uri import hide_keys

_HELP: Final = """
The value of an unset flag is in brackets below; a bare flag that takes true or
false says true. Standard output gets one JSON object, the result; a terminal
gets it with --json only. Exit codes: 0 done, 2 the request is invalid, 75 try
again later (no resources in time, no cluster or a lost one, storage that does
not answer, a folder that another run holds), 128 + N stopped by signal N,
1 anything else.
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
    from mnistsum_ray import pairs
    from mnistsum_ray.reporting.console import Console

    console = Console()
    output, source = pairs.export_pairs(config, console.say)
    rows, files = counted(config.rows, "row"), counted(config.files, "file")
    console.say(f"{rows} of {source.name} in {files}: {output.display}")
    written = {"output": output.display, "data": source.name}
    return written | {"split": config.split, "rows": config.rows, "files": config.files}


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
    answer = {"picture": config.picture} | vars(found)
    del answer["pixels"]
    return answer


COMMANDS: Final[dict[str, tuple[Callable[[Any], Result], Any, str]]] = {
    "train": (train, TrainConfig, "train the network"),
    "score": (score, ScoreConfig, "score Parquet files with a trained model"),
    "export-pairs": (export_pairs, ExportPairsConfig, "write example input for scoring"),
    "predict": (predict, PredictConfig, "answer for one picture and a number"),
}
"""What a command runs, the class of its config, and its meaning."""


def main(argv: list[str] | None = None) -> int:
    """Run a command, given by name and flags, or as this process was; return its exit code."""
    words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = "".join(f"  {name:<14}{meaning}\n" for name, (*_, meaning) in COMMANDS.items())
    parser = Parser("mnistsum COMMAND", f"{commands}\nCOMMAND --help lists its flags")
    parser.add_argument("command", choices=COMMANDS, help=SUPPRESS)
    parser.add_argument("--version", action="version", version=f"mnistsum_ray {__version__}")
    show_json = "--json" in words or not sys.stdout.isatty()
    try:
        name = parser.parse_args(words[:1]).command
        job, kind, _ = COMMANDS[name]
        flags = [word for word in words[1:] if word != "--json"]
        description = f"{inspect.getdoc(job)}\n{_HELP}"
        config = parse(kind, flags, description, shell_command(name))
    except RequestError as error:
        return _explain(error, None)
    return run(partial(job, config), show_json)


def run(job: Callable[[], Result], show_json: bool) -> int:
    """Run a job, whose result is the last line on standard output; return its exit code.

    SIGTERM and SIGHUP do what Ctrl-C does: a line says how to go on, and the code is 128 + signal.
    """
    stdout, stop = sys.stdout, StopSignals()
    with redirect_stdout(sys.stderr):  # what Ray's threads print at any time
        try:
            result = job()
            stop.ignore()
            code = 0
            if show_json:
                _write(f"{json.dumps(result, allow_nan=False)}\n", stdout.fileno())
        except (RequestError, RunError, KeyboardInterrupt) as error:
            stop.ignore()
            code = _explain(error, stop.received)
        stop.handle_by(lambda *_: os._exit(code))
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # a cluster of this process ends with its processes
    gc.freeze()  # Python would search a million objects of PyTorch and Ray for cycles, 0.7 s
    return code


def _write(text: str, file: int) -> None:
    try:
        # Without Python's buffer, which it would try to write again at its end.
        os.write(file, text.encode())
    except OSError as error:
        raise RunError(f"standard output cannot be written: {error.strerror}") from None


class StopSignals:
    """A stop signal raises KeyboardInterrupt, and a second one ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.handle_by(self._interrupt)

    def handle_by(self, handler: Callable[[int, FrameType | None], None]) -> None:
        """From here on this handles the stop signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` ignores SIGHUP, and a script's `&` SIGINT.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def ignore(self) -> None:
        self.handle_by(lambda *_: None)

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        self.received, received_at = signal.Signals(number), time.monotonic()

        def end(number: int, _: FrameType | None) -> None:
            if time.monotonic() > received_at + 1:  # `timeout` sends its signal twice
                os._exit(128 + number)

        self.handle_by(end)
        raise KeyboardInterrupt


def _explain(error: BaseException, received: signal.Signals | None) -> int:
    """Say why the job has ended, and how to go on; return the exit code."""
    text, code = f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        received = received or signal.SIGINT  # Ray Train has its own handler of this one
    if received:
        how = str(error) or "nothing was begun, and the same command begins again"
        text, code = f"stopped by {received.name}; {how}", 128 + received
    elif isinstance(error, RequestError):
        code = 2
    elif isinstance(error, TryAgainError):
        code = os.EX_TEMPFAIL  # 75: Kubernetes, cron and Airflow can tell it from a typo
    with suppress(OSError):  # the reader of standard error may have closed it
        print(printable(hide_keys(text)), file=sys.stderr, flush=True)
    return code
