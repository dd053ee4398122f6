"""The order of training rows and their draws: the same for any number of workers, and pinned."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from mnistsum_ray.data.randomness import (
    RandomStream,
    TrainingOrder,
    distortions,
    hold_out,
    positions_of_rank,
    random_numbers,
    sample,
    step_seed,
)


def random_order(case: int) -> TrainingOrder:
    """Blocks of any size, of which some have no training row."""
    draw = np.random.default_rng(case)
    bounds = np.cumsum([0, *draw.integers(1, draw.integers(2, 200), draw.integers(20, 60))])
    held_out = draw.integers(0, bounds[-1], bounds[-1] // 5)
    ids = np.setdiff1d(np.arange(bounds[draw.integers(0, 15)], bounds[-1]), held_out)
    batch_size, window_blocks = draw.integers(1, [300, 25]).tolist()
    return TrainingOrder(ids, bounds, batch_size, seed=case, window_blocks=window_blocks)


def rows_of_rank(order: TrainingOrder, steps: range, rank: int, workers: int) -> list[int]:
    positions = positions_of_rank(order.batch_size, rank, workers)
    return [row for _, ids in order.row_ids_of_steps(0, steps, positions) for row in ids.tolist()]


def batches(order: TrainingOrder, workers: int = 1, epoch: int = 0) -> list[list[int]]:
    """The global batch of each step, from the positions of all workers in their order."""
    steps: list[list[int]] = [[] for _ in range(order.steps)]
    for rank in range(workers):
        positions = positions_of_rank(order.batch_size, rank, workers)
        found = order.row_ids_of_steps(epoch, range(order.steps), positions)
        rows = iter([row for _, ids in found for row in ids.tolist()])
        for step, batch in enumerate(steps):
            end = min(positions.stop, order.batch_rows(step))
            batch += islice(rows, max(0, end - positions.start))
        assert not list(rows), "there are the rows of the steps and no others"
    return steps


@pytest.mark.parametrize("case", range(30))
def test_every_row_once_an_epoch_in_the_same_batches_for_any_number_of_workers(case: int) -> None:
    order = random_order(case)
    alone = batches(order)
    assert [len(batch) for batch in alone] == [*map(order.batch_rows, range(order.steps))]
    assert sorted(row for batch in alone for row in batch) == order.ids.tolist()
    assert batches(order, 2) == batches(order, 3) == alone
    assert alone not in (batches(order, epoch=1), batches(replace(order, seed=case + 1)))
    whole = replace(order, window_blocks=1000)
    assert batches(whole) == batches(replace(whole, bounds=order.bounds[[0, -1]])), "one window"
    cut = case % (order.steps + 1)
    parts = [rows_of_rank(order, steps, 1, 3) for steps in (range(cut), range(cut, order.steps))]
    assert parts[0] + parts[1] == rows_of_rank(order, range(order.steps), 1, 3)


def test_pinned_values() -> None:
    """A change of these numbers is a change of every run's result. The first are in order.py."""
    blocks = np.arange(0, 11, 2)
    example = TrainingOrder(np.arange(10), blocks, batch_size=4, seed=0, window_blocks=2)
    windows = [blocks for blocks, _ in example.row_ids_of_steps(0, range(3), range(4))]
    assert windows == [(1, 3), (2, 4), (0,)]
    assert batches(example) == [[6, 7, 2, 3], [4, 8, 9, 5], [0, 1]]
    shares = [rows_of_rank(example, range(3), rank, 2) for rank in (0, 1)]
    assert shares == [[6, 7, 4, 8, 0, 1], [2, 3, 9, 5]]
    blocks = np.array([*range(0, 60_000, 8192), 60_000])
    large = TrainingOrder(np.arange(60_000), blocks, 256, seed=0)
    assert batches(large)[0][:4] == [16855, 56143, 53943, 15840]
    assert random_numbers(0, 0, np.arange(12)).tolist() == [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
    assert random_numbers(0, 0, np.array([7, 1])).tolist() == [3, 4], "whatever rows are beside it"
    assert random_numbers(7, 3, np.array([0, 59_999, 2**40])).tolist() == [2, 4, 0]
    pinned = [0.9543918, -0.0486454, -0.0302301, -0.0030756, 1.0640106, 0.0707326]
    matrices = distortions(0, 0, np.arange(2), strength=1.0)
    assert matrices[0].tolist() == pytest.approx(pinned, abs=1e-6)
    assert step_seed(0, 0, 0, RandomStream.DROPOUT) == 5784922337503569493
    kept, held_out = hold_out(np.arange(20), 4)
    assert held_out.tolist() == [0, 5, 8, 16]
    assert sorted([*kept, *held_out]) == [*range(20)]
    assert sample(np.arange(0, 100, 10), 4).tolist() == [0, 20, 50, 70]
