"""Score Parquet files with a trained model: predict the digit and the sum of each row, and account for every row.

    python jobs/score.py --model runs/mine --input pairs/ --output predictions/
    python jobs/score.py --model runs/mine --input 'days/*/*.parquet' late.parquet --output predictions/ --label-column digit
    python jobs/score.py --model s3://bucket/runs/mine --input s3://bucket/pairs --output s3://bucket/predictions --strict
    ray job submit --working-dir . -- python jobs/score.py --model runs/mine --input /data/pairs --output predictions/

The same command continues after a kill, and adds input files that are new.

Each input file has one output file of the same name, or several if it is large, with its columns except the image, and
pred_digit, digit_prob, pred_sum, sum_prob and consistent. Rows that cannot be scored are in _rejected/ with the reason.
_files.parquet holds the result of each file; _manifest.json, written last, the totals.

The value of an unset flag is in brackets below. Exit codes: 0 done, 2 the request is invalid, 3 finished, but some files or rows
could not be scored, 128 + N stopped by signal N, 1 anything else. The last line on standard output is one JSON object; everything
else goes to standard error.
"""

import sys
from typing import Any

from mnistsum_ray import cli


def score(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import ScoreConfig

    config = parse(ScoreConfig, argv, __doc__)

    cli.reserve_stdout_for_result()

    from mnistsum_ray import score as score_files  # imports NumPy and more, which would delay --help

    line = score_files(config)
    return line, cli.INCOMPLETE if line["rejected_rows"] or line["failed_files"] else cli.DONE


def main(argv: list[str]) -> int:
    return cli.run(score, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
