"""Score Parquet with a trained model: for each row its digit and its sum, and every row accounted for.

    python jobs/score.py --model runs/mine --input pairs/ --output predictions/
    python jobs/score.py --model runs/mine --input 'days/*/*.parquet' late.parquet --output predictions/ --label-column digit
    python jobs/score.py --model s3://bucket/runs/mine --input s3://bucket/pairs --output s3://bucket/predictions --strict
    ray job submit --working-dir . -- python jobs/score.py --model runs/mine --input /data/pairs --output predictions/

Run the same command again to go on after a kill, or to add the files that have come since.

For each input file the output has one of the same name, several where it is large: its columns without the image, then
pred_digit, digit_prob, pred_sum, sum_prob and consistent. Rows that cannot be scored are in _rejected/ with the reason;
_files.parquet says what came of each file, and _manifest.json, written last, of the whole.

Brackets hold what an unset flag becomes. Exit codes: 0 done, 2 the request is wrong, 3 finished but some files or rows could
not be used, 1 anything else. The last line on standard output is one JSON object; everything else goes to standard error.
"""

import sys
from typing import Any

from mnistsum_ray import cli


def score(argv: list[str]) -> tuple[dict[str, Any], int]:
    from mnistsum_ray.arguments import parse  # not sooner: first of all a signal has to be caught
    from mnistsum_ray.config import ScoreConfig

    config = parse(ScoreConfig, argv, __doc__)

    cli.leave_stdout_to_result()

    from mnistsum_ray import score as score_files  # numpy and more, which `--help` should not wait for

    line = score_files(config)
    return line, cli.INCOMPLETE if line["rejected_rows"] or line["failed_files"] else cli.DONE


def main(argv: list[str]) -> int:
    return cli.run(score, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
