"""What plain Ray does with rows, as README's table says: why this project is longer than a guide.

If one of these fails, Ray has changed, and something here may have become needless.
"""

import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from tests.integration.test_security import Bomb, disguised

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("cluster")]


def test_equal_shards_drop_rows() -> None:
    shards = ray.data.range(100).streaming_split(3, equal=True)

    def count(shard: Any) -> int:
        return sum(len(batch["id"]) for batch in shard.iter_batches())

    counters = ray.remote(num_cpus=0)(count)
    assert sum(ray.get([counters.remote(shard) for shard in shards])) == 99


def test_blocks_stand_in_the_order_in_which_their_tasks_end(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(4):
        rows = pa.table({"row": np.arange(number * 1000, number * 1000 + 1000)})
        pq.write_table(rows, tmp_path / "rows" / f"{number}.parquet")
    is_another_done = tmp_path / "is_another_done"

    def read_slowly(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["row"][0] != 0:
            is_another_done.touch()
            return batch
        deadline = time.monotonic() + 15  # another process takes seconds to start
        while not is_another_done.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # until its block is with the driver
        return batch

    for _ in range(3):  # Ray may run all tasks in one process, one after the other
        is_another_done.unlink(missing_ok=True)
        files = ray.data.read_parquet(str(tmp_path / "rows"), override_num_blocks=4)
        read = files.map_batches(read_slowly, batch_size=None).materialize().take_all()
        assert sorted(row["row"] for row in read) == list(range(4000))
        if read[0]["row"] != 0:
            return
    pytest.fail("the blocks stood in the order of the files, three times")


def test_a_second_write_parquet_adds_its_rows_to_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        ray.data.range(100).write_parquet(str(tmp_path))
    assert ray.data.read_parquet(str(tmp_path)).count() == 200


def test_a_list_of_checkpoints_that_is_cut_ends_the_next_run_of_its_name(tmp_path: Path) -> None:
    def train_loop_per_worker() -> None:
        checkpoint = ray.train.Checkpoint.from_directory(tempfile.mkdtemp(dir=tmp_path))
        ray.train.report({}, checkpoint)

    def fit() -> None:
        run_config = ray.train.RunConfig(name="mine", storage_path=str(tmp_path))
        TorchTrainer(train_loop_per_worker, run_config=run_config).fit()

    fit()
    (saved,) = (tmp_path / "mine").glob("*snapshot.json")
    saved.write_text(saved.read_text()[:-10])
    with pytest.raises(Exception, match="CheckpointManagerInitializationError"):
        fit()


def test_an_actor_that_dies_of_its_input_is_started_again_and_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"

    class DieFiveTimes:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with starts.open("a") as file:
                file.write("1")
            if starts.stat().st_size <= 5:
                os._exit(1)
            return batch

    rows = ray.data.range(1).map_batches(DieFiveTimes, concurrency=1).take_all()
    assert rows == [{"id": 0}]
    assert starts.stat().st_size == 6


def test_a_column_that_is_missing_in_a_file_becomes_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1], "number": [1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [2]}), tmp_path / "1.parquet")
    numbers = [row["number"] for row in ray.data.read_parquet(str(tmp_path)).take_all()]
    assert sorted(numbers, key=str) == [1, None]


def test_small_files_become_one_block(tmp_path: Path) -> None:
    for number in range(8):
        pq.write_table(pa.table({"row": np.arange(1000)}), tmp_path / f"{number}.parquet")
    assert ray.data.read_parquet(str(tmp_path)).materialize().num_blocks() == 1


def test_one_damaged_file_ends_a_job(tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": [1]}), tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(Exception, match=r"[Pp]arquet"):
        ray.data.read_parquet(str(tmp_path)).map_batches(lambda batch: batch).take_all()


def test_arrow_runs_code_of_a_file_once_ray_data_is_imported(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "0.parquet"
    rows = pa.table({"note": [pickle.dumps(Bomb(mark))]})
    pq.write_table(disguised(rows, "note", "arrow_pickled_object"), file)
    pq.read_table(file).to_pylist()
    assert mark.exists()
