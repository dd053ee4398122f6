"""Write example input for scoring: Parquet files of MNIST images, each with a number and the true
digit.

    mnistsum export-pairs --output pairs/
    mnistsum export-pairs --data mnist --split test --output pairs/ --rows 2000000 --files 100

The last line on standard output is one JSON object. Exit codes: 0 done, 2 the request is invalid,
1 anything else.
"""

from typing import Any

from mnistsum_ray import cli


def run(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the job; return its result and its exit code."""
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import ExportPairsConfig

    config = parse(ExportPairsConfig, argv, __doc__)

    from mnistsum_ray.export.pairs import export_pairs
    from mnistsum_ray.reporting.console import Console

    output, source = export_pairs(config, Console().say)
    line = {"output": output.display, "data": source.name, "split": config.split, "rows": config.rows, "files": config.files}
    return line, cli.DONE
