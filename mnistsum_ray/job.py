"""What the jobs share: one line for a refusal, one JSON line for the result, the exit code."""

import json
import sys
from collections.abc import Callable
from typing import Any, Final

from mnistsum_ray.config import Refusal, RunFailed

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
INCOMPLETE: Final = 3
"""Finished, but some of the input could not be used."""


def run(job: Callable[[list[str]], tuple[dict[str, Any], int]], argv: list[str]) -> int:
    """Run a job to its exit code: its result is the last line on standard output, a refusal one line on standard error."""
    stdout = sys.stdout
    try:
        result, code = job(argv)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        return REFUSED
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return FAILED
    print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
    return code


def leave_stdout_to_result() -> None:
    """From here on only the job's last line goes to standard output: Ray's threads print there at any time, also after it."""
    sys.stdout = sys.stderr
