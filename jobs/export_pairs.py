"""Write Parquet for trying jobs/score.py: MNIST images, each with a number, and the true digit beside them.

    python jobs/export_pairs.py --output pairs/
    python jobs/export_pairs.py --data mnist --split test --output pairs/ --rows 2000000 --files 100

The last line on standard output is one JSON object. Exit codes: 0 done, 2 the request is wrong, 1 anything else.
"""

import sys
from typing import Any

from mnistsum_ray import job


def export_pairs(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.config import ExportConfig, parse  # not sooner: first of all a signal has to be caught

    config = parse(ExportConfig, argv, __doc__)

    from mnistsum_ray.console import Console
    from mnistsum_ray.export import export

    output, source = export(config, Console().say)
    line = {"output": output.text, "data": source.name, "split": config.split, "rows": config.rows, "files": config.files}
    return line, job.DONE


def main(argv: list[str]) -> int:
    return job.run(export_pairs, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
