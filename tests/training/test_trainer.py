"""One worker's part of a step is its part of the global batch, whatever the number of workers."""

import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from mnistsum_ray.data.randomness import TrainingOrder
from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.device import broadcast_state
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.network import make_network
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.checkpoint import TrainerState, read_checkpoint, save_checkpoint
from mnistsum_ray.training.trainer import EpochCounter
from tests.training import CPU, as_worker, new_trainer

COUNTED = [
    ([7, 6, 5, 4, 3, 2, 1, 0], ""),
    ([0, 1, 2, 3, 4, 5, 6], "saw 7 rows, where the plan has 8"),
    ([0, 1, 2, 4, 4, 4, 6, 7], "saw other rows than planned"),  # though 3 + 5 is twice 4
]


@pytest.mark.parametrize(("ids", "said"), COUNTED)
def test_lost_and_repeated_rows_are_noticed(ids: list[int], said: str) -> None:
    order = TrainingOrder(np.arange(8), np.array([0, 8]), batch_size=4, seed=0)
    counter = EpochCounter(CPU)
    counter.add({"row_id": torch.tensor(ids)}, torch.zeros(1))
    counter.all_reduce()
    if said:
        with pytest.raises(RowCountError, match=f"^an epoch {said}: rows were lost or repeated"):
            counter.check(order, "an epoch")
    else:
        counter.check(order, "an epoch")


def train(folder: Path, rank: int, world_size: int) -> None:
    """Train four steps, and leave a checkpoint in the folder."""
    trainer = new_trainer(rank, world_size, recipe="long", batch_size=32)  # with dropout
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8, generator=draw)
        digits, numbers = torch.randint(0, 10, (2, 32), generator=draw)
        mine = slice(trainer._positions.start, trainer._positions.stop)
        batch = {"image": images[mine], "digit": digits[mine], "number": numbers[mine]}
        trainer._step(batch, 0, step, 32, 0.05)
    if rank == 0:
        save_checkpoint(folder, TrainerState(0, [], "fp32"), trainer.model, trainer.optimizer)
    expected = copy_weights(trainer.model) | {"seen": torch.tensor(0)}
    trainer.model.register_buffer("seen", torch.tensor(rank))
    for parameter in trainer.model.parameters():
        parameter.data += rank
    broadcast_state(trainer.model)
    found = copy_weights(trainer.model)
    same = [torch.equal(found[name], value) for name, value in expected.items()]
    assert all(same), "rank 0 has others"


def run_worker(rank: int, folder: Path, world_size: int, port: int) -> None:
    """Train as a worker of a group, which Ray Train finds as torchrun leaves it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    as_worker(partial(train, folder, rank, world_size))


def test_three_workers_train_as_one_does(tmp_path: Path) -> None:
    """That a new group goes on bit for bit: tests/integration/test_faults.py."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])  # imported once, and slowly
    for name, ranks in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        given = (tmp_path / name, ranks, port)
        start_processes(run_worker, given, ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
    one, three = (read_checkpoint(Location(str(tmp_path / name)))[1] for name in ("one", "three"))
    # The ranks have 10, 11 and 11 rows of each batch. With wrong weights of the ranks layers differ
    # by 4 to 20 %, else by 0.5 %.
    torch.manual_seed(0)
    for name, start in copy_weights(make_network()).items():
        key = f"model.{name}"
        difference, trained = (three[key] - one[key]).norm(), (one[key] - start).norm()
        assert difference < 0.03 * trained, name
