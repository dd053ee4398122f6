"""The command `mnistsum`: run a job by its name. `python -m mnistsum_ray` and the files in `jobs/` do the same.

mnistsum train --data sample
mnistsum COMMAND --help
"""

import sys
from importlib import import_module
from typing import Final

from mnistsum_ray import __version__, cli

COMMANDS: Final = {
    "train": "train the network",
    "score": "score Parquet files with a trained model",
    "export-pairs": "write example input for scoring",
    "export-model": "write a model for programs without this package",
    "benchmark": "measure speed beside plain PyTorch",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: name of the command and its flags; None takes those of this process.

    Returns:
        The exit code: 0 done, 2 the request is invalid, 3 some input could not be used, 128 + N stopped by signal N, 1 anything
        else.
    """
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return cli.DONE
    if command == "--version":
        print(f"mnistsum_ray {__version__}")
        return cli.DONE
    if command not in COMMANDS:
        print(f"error: {command}: there is no such command\n\n{_usage()}", file=sys.stderr)
        return cli.BAD_REQUEST
    module = import_module(f"mnistsum_ray.commands.{command.replace('-', '_')}")
    return cli.run(module.run, flags)


def _usage() -> str:
    lines = [f"  {name:<14}{meaning}" for name, meaning in COMMANDS.items()]
    lines += ["", "  --version     print the version"]
    return "\n".join(["usage: mnistsum COMMAND [flags], or mnistsum COMMAND --help", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
