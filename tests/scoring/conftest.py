"""Plans of real files, without a model and without a cluster."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.inference import Predictions
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.parts import PART_SCHEMA, Part
from mnistsum_ray.scoring.preflight import Plan, Request, make_plan, read_footers
from mnistsum_ray.scoring.worker import PartRows, read_parts, write_part
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable

CONSOLE = Console(io.StringIO())


def plan_of(folder: Path | str, output: Path | str = "/nowhere", sha256: str = "abc", **settings: Any) -> Plan:
    """Plan to score the files in a folder, in float32 unless another precision is set."""
    config = ScoreConfig(model="m", input=(str(folder),), output=str(output), **settings)
    place = locate(str(output), "--output")
    card = {"sha256": sha256, "epoch": 1, "parameters": 1}
    inputs = list_inputs(config.input, locate("/nowhere", "--output"))
    request = Request(config, place, card, {}, inputs, place, read_footers(inputs, config, CONSOLE))
    return make_plan(request, config.precision or "fp32", writable(place), CONSOLE)


def parts_of(plan: Plan) -> list[Part]:
    return [Part(**row) for row in plan.parts.select(PART_SCHEMA.names).to_pylist()]


def predictions(count: int) -> Predictions:
    """Digits 0, 1, 2 …, whose sums with the numbers 1, 2, 3 … are right but for the first."""
    digits = (np.arange(count) % 10).astype(np.int8)
    sums = (2 * digits + 1).astype(np.int8)
    sums[:1] = 18
    values = {f"pred_{head.name}": np.zeros(count, np.int8) for head in HEADS} | {"pred_digit": digits, "pred_sum": sums}
    values |= {f"{head.name}_prob": np.full(count, 0.5, np.float32) for head in HEADS}
    return Predictions(values)


def write_all(plan: Plan) -> None:
    """Commit all parts of a plan, in this process."""
    for _, rows in read_parts(plan.inputs.root, parts_of(plan), plan.config):
        assert isinstance(rows, PartRows), rows
        write_part(plan, rows, predictions(len(rows.numbers)))
