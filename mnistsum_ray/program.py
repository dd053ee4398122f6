"""How this process was started, for messages that show a command."""

import sys
from pathlib import Path


def shell_command(command: str) -> str:
    """Return the beginning of a command line: `python jobs/train.py` if a file in jobs/ was run, else `mnistsum train`."""
    script = Path(sys.argv[0])
    if script.parent.name == "jobs":
        return f"python jobs/{command.replace('-', '_')}.py"
    return f"mnistsum {command}"
