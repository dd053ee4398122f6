"""Write example input for jobs/score.py: Parquet files of MNIST images, each with a number and the true digit.

    python jobs/export_pairs.py --output pairs/
    python jobs/export_pairs.py --data mnist --split test --output pairs/ --rows 2000000 --files 100

The last line on standard output is one JSON object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

import sys
from typing import Any

from mnistsum_ray import cli


def export(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import ExportPairsConfig

    config = parse(ExportPairsConfig, argv, __doc__)

    from mnistsum_ray.export.pairs import export_pairs
    from mnistsum_ray.reporting.console import Console

    output, source = export_pairs(config, Console().say)
    line = {"output": output.display, "data": source.name, "split": config.split, "rows": config.rows, "files": config.files}
    return line, cli.DONE


def main(argv: list[str]) -> int:
    return cli.run(export, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
