"""What the jobs share: joining a cluster quietly, one line for a refusal, one JSON line for the result, the exit code."""

import json
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

from mnistsum_ray.config import Refusal, RunFailed

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2


def run(job: Callable[[list[str]], dict[str, Any]], argv: list[str]) -> int:
    """Run a job to its exit code: its result is the last line on standard output, a refusal one line on standard error."""
    try:
        result = job(argv)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        return REFUSED
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return FAILED
    print(json.dumps(result), flush=True)
    return DONE


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one."""
    import ray  # a second to import, which a refusal need not wait for

    # Without the dashboard a cluster of our own starts seconds earlier; one that is joined keeps its own.
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
