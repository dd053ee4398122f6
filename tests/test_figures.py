"""No figure of a page is typed by hand: it is recorded, or follows from the code.

A sentence with a figure is written down here once more, with the figure as the code has it. What
is left of a page then must have no digit, so a figure that somebody changes in a page is noticed.
"""

import re
import tomllib
from typing import Any, Final

import numpy as np
import pytest
import yaml

from mnistsum_ray.cluster import resources
from mnistsum_ray.data import sources
from mnistsum_ray.data.columns.base import rows_in
from mnistsum_ray.mnist import DIGITS, NUMBERS, SIDE, SUMS
from mnistsum_ray.mnist.datasets import SAMPLE
from mnistsum_ray.mnist.task import FEW_ROWS, MnistSum
from mnistsum_ray.scoring import parts
from mnistsum_ray.task import Task
from mnistsum_ray.training import worker
from tests import record
from tests.jobs import ROOT

PAGES: Final = {str(page.relative_to(ROOT)): page for page in record.PAGES}

NAMES: Final = re.compile(
    r"\b(u?int(8|16|32|64)|float(16|32|64)|bfloat16|bf16|fp32|SHA-256|S3|s3|INT96|us-east-1|boto3"
    r"|kill -9|Apache 2\.0|BY-SA\s+3\.0)\b"
)
"""Names that hold a digit."""

EXIT_CODES: Final = {"done": 0, "other": 1, "request": 2, "later": 75}
DRIVER: Final = 580
"""NVIDIA's driver that PyTorch's build needs, which no file of this project has."""


def prose_of(text: str) -> str:
    """What a person has written in a page: no recorded block, code, or target of a link."""
    text = record.BLOCK.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^#+ \d\. |^\d\. ", "", text, flags=re.MULTILINE)  # numbers of steps
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return " ".join(text.split())


def facts() -> dict[str, list[str]]:
    """By page, each place with a figure."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    python = f"Python 3.{low} to 3.{int(high) - 1}"
    (ray,) = [need for need in project["dependencies"] if need.startswith("ray[")]
    ray_low, ray_high = re.findall(r"2\.(\d+)", ray)
    epochs, batch = {}, {}
    for recipe in ("quick", "short", "long", "small"):
        defaults = MnistSum(MnistSum.Settings(recipe=recipe)).defaults(1)
        epochs[recipe], batch[recipe] = defaults["epochs"], defaults["batch_size"]
    cron = yaml.safe_load((ROOT / "docs/deploy/cronjob.yaml").read_text())
    job = cron["spec"]["jobTemplate"]["spec"]
    pod: dict[str, Any] = job["template"]["spec"]["containers"][0]["resources"]["requests"]
    alerts = (ROOT / "docs/deploy/alerts.yaml").read_text()
    (missed,) = re.findall(r"> (\d+) \* 3600", alerts)
    done, other, request, later = EXIT_CODES.values()
    row = rows_in(2**20, MnistSum.inputs.values())
    own = Task.defaults(MnistSum(), 1)
    per_gpu = resources._ROWS_PER_GPU
    shuffled = worker._SHUFFLED_BYTES
    held_out = sources._MOST_HELD_OUT
    assert (SUMS, SIDE) == (DIGITS + NUMBERS - 1, 28)
    return {
        "README.md": [
            f"{python} and 2 GB of disk for the CPU build",
            f"NVIDIA driver {DRIVER} or newer",
            f"an MNIST image (say 5) and a number from 0 to {NUMBERS - 1} (say 7)",
            f"the digit (5) and the sum ({5 + 7})",
            f"`quick` ({epochs['quick']} epoch), `short` ({epochs['short']} epochs, the default)",
            f"`long` ({epochs['long']} epochs) or `small` ({epochs['small']} epochs",
            f"the default below {FEW_ROWS:,} rows",
            "`--num-workers 2`",
            f"Exit codes: {done} done, {request} bad request, {later} try again later",
            f"128 + N stopped by signal N, {other} anything else",
        ],
        "docs/deploy/README.md": [
            f"probably older than {DRIVER}",
            "`--batch-size 512` uses two",
            f"ends with exit code {later}",
            "`--use-gpu false --num-workers 4`",
            f"| {request} | a wrong flag",
            f"| {later} | no nodes",
            "| 128 + N | signal N",
            f"| {other} | anything else",
            f"`RestartForceExitStatus={later}`",
            f"itself ends with {other} for each failed job, and with {done} after",
            f"Ray 2.{ray_low} to 2.{int(ray_high) - 1}, {python}",
            "HEAD:8265",
            "`RAY_USAGE_STATS_ENABLED=0`",
        ],
        "docs/deploy/aws.md": [
            "forwards port 8265",
            "`--max-failures` (default 3)",
            "`--num-workers 4` waits for four",
            "`--num-workers 1,4` starts with one",
        ],
        "docs/deploy/kubernetes.md": [
            "KubeRay 1.7.0 or newer",
            f"driver {DRIVER} or newer",
            "disks of 50 GiB",
            f"each pod asks for {pod['ephemeral-storage'].removesuffix('Gi')} GiB",
            "takes about 10 GB",
            "after 300 s",
            f"ends with exit code {request}",
            f"asks for {pod['cpu']} CPUs and {pod['memory'].removesuffix('Gi')} GiB",
            f"after {job['activeDeadlineSeconds'] // 3600} hours",
            f"not after [exit code {request}]",
            "`s3://BUCKET/scored/2`",
            "`day1.parquet`",
            "`predictions/day1.parquet`",
            "`predictions/day1-NNNNN-of-NNNNN.parquet`",
            "`day1*`, which matches `day10.parquet`",
            "above about 50,000",
        ],
        "docs/deploy/metrics.md": [
            "`ray start --metrics-export-port=8080`",
            "below 20 s",
            "vanish 20 s after",
            "[14d]",
            "no new rows for 30 minutes",
            f"more than {missed} hours ago",
            f"lower the {missed} hours",
        ],
        "docs/guarantees.md": [
            "`--num-workers 1,4`",
            f"the job ends with {later} | `test_a_training_gives",
            f"the job ends with {other} | `test_a_training_that_fails",
            f"the job ends with {later} | `test_a_head",
            f"Ray ends the job with {other} after 60 s",
            f"one may end with {later}",
            f"ends with {later} after `--wait-seconds`",
            f"for 50 seconds; then the job ends with {later}",
        ],
        "docs/messages.md": [
            "GCS within 60 seconds",
            "max_restarts > 0",
            "`softmax(0)`",
        ],
        "docs/plain-ray.md": [f"ends with exit code {later}"],
        "docs/python.md": [f"digits [n, {DIGITS}] and of the sums [n, {SUMS}]"],
        "docs/results.md": [
            f"seeds {record.SEEDS[0]}, {record.SEEDS[1]} and {record.SEEDS[2]}",
            "Python 3.11 |",
        ],
        "docs/scoring.md": [
            f"(0 to {NUMBERS - 1})",
            "write 0",
            "`name-00000-of-00004.parquet`",
            "`name-00003-of-00004.parquet`",
            "at least 8 MiB and at most 32 MiB",
            f"for MNIST {8 * row:,} and {32 * row:,} rows",
            f"exit code {later}",
            f"**Exit codes.** {other} if no row could be scored. {request} if",
            f"`row_group_size={32 * row}`",
        ],
        "docs/task.md": [
            "uint8[n, height, width, 3]",
            "uint8[n, side, side, 3]",
            "from 0 to below - 1",
            "`missing=0` fills",
            "-1 after the end",
            "one epoch of 500 rows",
            '`draws.uniform("angle", 2)` gives two numbers from 0 to 1',
            "`--dropout 0.2`",
            f"{own['epochs']} epochs, batches of {own['batch_size']} and a learning rate of "
            f"{own['learning_rate']}",
            f"exit code {request}",
            "`--num-workers 2`",
            f"one GPU per {per_gpu}",
            f"code {later}",
        ],
        "docs/training.md": [
            f": {len_of_sample():,} bundled images",
            f"{SIDE * SIDE} bytes",
            f"at most about {held_out:,}",
            "`test-00000`",
            "`--max-rows 2000` uses at most about 2,000 rows",
            "at least 1",
            f"one per {per_gpu} rows",
            f"up to {shuffled // 2**20} MiB",
            f"which is {rows_in(shuffled, MnistSum.inputs.values()):,} rows",
        ],
        "docs/walk.md": [
            f"uint8[{SIDE}, {SIDE}]",
            "step 4 shows",
            f"code {later}",
            f"ends with {later}. After that",
            f"up to {shuffled // 2**20} MiB",
            "rank 0",
            "Rank 0",
            f"about {parts._TASK_BYTES // 2**20} MiB",
            "`predictions/day1-00000-of-00004.parquet`",
        ],
    }


def len_of_sample() -> int:
    import pyarrow.parquet as pq

    rows: int = pq.read_metadata(SAMPLE).num_rows
    return rows


def problem_of(name: str, text: str) -> str:
    """What is wrong with the figures of a page that has this text; "" if nothing is."""
    if record.render(text, record.read_record()) != text:
        return f"{name} is not as recorded: python tests/record.py write"
    prose = prose_of(text)
    for fact in facts().get(name, []):
        if fact not in prose:
            return f"{name} does not say: {fact}"
        prose = prose.replace(fact, "")
    for found in re.finditer(r"\d", NAMES.sub("", prose)):
        where = NAMES.sub("", prose)[max(0, found.start() - 60) : found.end() + 20]
        return f"{name} has a figure that no test knows: {where}"
    return ""


@pytest.mark.parametrize("name", PAGES)
def test_each_figure_of_a_page_is_recorded_or_follows_from_the_code(name: str) -> None:
    assert problem_of(name, PAGES[name].read_text()) == ""


@pytest.mark.parametrize("name", PAGES)
def test_a_figure_that_is_changed_by_hand_is_noticed(name: str) -> None:
    """Those of code and links have tests of their own."""
    text = PAGES[name].read_text()
    blocks = [found.span() for found in record.BLOCK.finditer(text)]
    places = [found.start() for found in re.finditer(r"\d", text)]
    for place in np.random.default_rng(0).permutation(places)[:20]:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        is_recorded = any(start <= place < end for start, end in blocks)
        if is_recorded or prose_of(changed) != prose_of(text):
            assert problem_of(name, changed), changed[place - 60 : place + 20]


def test_the_pages_are_short() -> None:
    counts = {name: len(page.read_text().split()) for name, page in PAGES.items()}
    assert len(PAGES["README.md"].read_text().splitlines()) <= 220
    assert counts["README.md"] <= 1_700
    assert sum(counts.values()) <= 11_500
    assert max(count for name, count in counts.items() if name != "README.md") <= 1_500
