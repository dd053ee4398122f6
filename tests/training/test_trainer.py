"""One worker's part of a step is its part of the global batch, whatever the number of workers."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters, TrainConfig
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.training.events import EventSender
from mnistsum_ray.training.preflight import preflight
from mnistsum_ray.training.schedule import Schedule
from mnistsum_ray.training.state import EpochProgress
from mnistsum_ray.training.trainer import EpochCounter, Trainer
from mnistsum_ray.training.worker import Worker

CPU = torch.device("cpu")


def hyperparameters() -> Hyperparameters:
    return preflight(TrainConfig(data="sample", recipe="long")).hyperparameters


def dropout_of(rank: int, world_size: int, step: int) -> torch.Tensor:
    """The factors of a worker's share of a batch of 128 rows, or of the last one, which has a single row."""
    schedule = Schedule(RowRanges.of(0, 129), 128, 128, seed=3, distortion=0.0, epochs=1, rank=rank, world_size=world_size)
    silent = EventSender(Queue.__new__(Queue), rank=1)  # only rank 0 sends
    factors = Trainer(hyperparameters(), Worker(rank, world_size, CPU, 1), silent)._dropout(0, step, schedule)
    assert factors is not None
    return factors


def test_shares_of_dropout_are_those_of_the_whole_batch() -> None:
    whole = dropout_of(0, 1, 0)
    assert whole.shape == (128, 128, 3, 3)
    assert 0.7 < (whole > 0).float().mean() < 0.8
    shares = [dropout_of(rank, 3, 0) for rank in range(3)]
    assert sum(map(len, shares)) == 128
    places = torch.cat([torch.arange(128)[rank::3] for rank in range(3)])
    assert torch.equal(torch.cat(shares), whole[places])


def test_a_share_without_rows_has_dropout_without_rows() -> None:
    assert [len(dropout_of(rank, 2, 1)) for rank in range(2)] == [1, 0]


@pytest.mark.parametrize(("steps", "checked"), [(1, [1]), (40, [16, 32, 40]), (1000, range(16, 1016, 16))])
def test_the_losses_within_an_epoch_are_means_since_the_one_before(steps: int, checked: Iterable[int]) -> None:
    """One row a step, whose loss is the number of the step."""
    counter, progress, done = EpochCounter(EpochProgress(), steps, CPU), EpochProgress(), 0
    for check in (min(check, steps) for check in checked):
        for step in range(done + 1, check + 1):
            counter.add(torch.tensor([step]), torch.tensor(float(step)))
        progress, _ = counter.all_reduce(check, flag=False)
        if done < steps // 2 <= check:  # a resumed epoch goes on from a checkpoint within it
            counter = EpochCounter(progress, steps, CPU)
        done = check
    losses = progress.step_losses()
    assert losses[-1][0] == steps
    assert len(losses) == min(len(list(checked)), 100)
    assert losses == [(now, (before + 1 + now) / 2) for before, now in pairwise([0, *(step for step, _ in losses)])]
