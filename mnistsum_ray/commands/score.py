"""Score Parquet files with a trained model: predict the digit and the sum of each row, and account
for every row.

    mnistsum score --model runs/mine --input pairs/ --output scored/
    mnistsum score --model runs/mine --input 'days/*/*.parquet' late.parquet --output scored/
    mnistsum score --model s3://bucket/runs/mine --input s3://bucket/in --output s3://bucket/out
    ray job submit --working-dir . -- python jobs/score.py --model M --input /data/pairs --output O

The same command continues after a kill, and adds input files that are new.

Each input file has one file of the same name in OUTPUT/predictions/, or several if it is large,
with its columns except the image, and pred_digit, digit_prob, pred_sum, sum_prob and consistent.
Rows that cannot be scored are in OUTPUT/rejected/ with the reason. OUTPUT/files.parquet holds the
result of each file; OUTPUT/manifest.json, written last, the totals.

The value of an unset flag is in brackets below. Exit codes: 0 done, 2 the request is invalid,
3 finished, but this run had to set files or rows aside, 128 + N stopped by signal N, 1 anything
else. The last line on standard output is one JSON object; everything else goes to standard error.
"""

from typing import Any

from mnistsum_ray import cli


def run(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the job; return its result and its exit code."""
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import ScoreConfig

    config = parse(ScoreConfig, argv, __doc__)

    cli.reserve_stdout_for_result()

    from mnistsum_ray.api import run_scoring  # imports NumPy and more, which would delay --help

    line, set_aside = run_scoring(config)
    return line, cli.INCOMPLETE if set_aside else cli.DONE
