"""Spot nodes that are taken away one after the other: a training goes on as long as epochs end in between."""

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.training.checkpoint import STATE_CARD
from tests.integration.conftest import Job, lose_node, no_job_is_left, nodes  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

LOSSES = 2
"""One more than the failures in a row that the run survives."""


def last_checkpoint(run: Path) -> str:
    return max((card.parent.name for card in run.glob(f"*/{STATE_CARD}")), default="")


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_training_that_loses_more_nodes_than_it_has_lives_gives_the_model_of_an_undisturbed_one(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(SAMPLE)[::10], tmp_path / "rows.parquet")
    flags = ["--data", tmp_path / "rows.parquet", "--storage-path", tmp_path, "--recipe", "long", "--batch-size", 32]
    flags += ["--epochs", 8, "--sum-head-steps", 5, "--max-failures", LOSSES - 1]
    with nodes(0, 1) as cluster:
        job = Job("train", *flags, "--name", "disturbed", address=cluster.address)
        job.wait_until(lambda: last_checkpoint(tmp_path / "disturbed"))
        for _ in range(LOSSES):
            lost = cluster.list_all_nodes()[-1].node_ip_address
            lose_node(cluster, notice=False)
            assert job.wait_for_line("the node ").startswith(f"the node {lost} was lost")
            job.wait_for_line("going on after epoch")
            before = last_checkpoint(tmp_path / "disturbed")
            job.wait_until(lambda before=before: last_checkpoint(tmp_path / "disturbed") > before)  # type: ignore[misc]
        assert job.wait().line
        assert Job("train", *flags, "--name", "alone", address=cluster.address).wait().line
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "alone")
