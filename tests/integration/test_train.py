"""Trainings: what they say, what they leave, how they end, and how one begins from another.

That a command prints its result alone on standard output: test_readme.py.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.nn.functional as F
from ray.train.torch import TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group

from mnistsum_ray import RequestError, RunError, TrainConfig, fit, load_model, save_model
from mnistsum_ray.cli import config_from_args
from mnistsum_ray.cluster.workarounds import free_cpus
from mnistsum_ray.data.decoding import RowTotals, decode, without_origin
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import TryAgainError, percent
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model.device import broadcast_state
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.task import Batch
from mnistsum_ray.training import job
from mnistsum_ray.training.loop import HeldOutRows
from mnistsum_ray.training.rows import EveryRow, read_rows
from mnistsum_ray.training.worker import Worker
from tests.integration.conftest import (
    Result,
    joined,
    metrics_of,
    nodes,
    score_here,
    start_cluster,
    train_here,
)
from tests.jobs import Job, history_of, wait_until
from tests.training import CPU, SILENT, as_worker, hyperparameters, mnist, open_data


@pytest.fixture(scope="module")
def done(cluster: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with all that a run draws (numbers, order, distortions, dropout), in float32."""
    settings: dict[str, Any] = {"recipe": "long", "epochs": 2, "precision": "fp32"}
    return train_here(data=data, storage_path=tmp_path_factory.mktemp("runs"), **settings)


@pytest.fixture(scope="module")
def run(done: Result) -> Path:
    return Path(done.line["run"])


@pytest.fixture(scope="module")
def card(run: Path) -> dict[str, Any]:
    """What model.json says."""
    found: dict[str, Any] = json.loads((run / "model" / "model.json").read_text())
    return found


@pytest.fixture(scope="module")
def test_rows(cluster: str, data: Path) -> Any:
    """The test rows as a table: `image`, `digit`, `row_id`."""
    columns = MnistSum().training_columns
    rows = read_rows(open_data(data), columns, 0, skip_bad_rows=False).datasets["test"]
    return pa.concat_tables(rows.iter_batches(batch_format="pyarrow")).combine_chunks()


def test_the_result_has_these_fields_and_the_console_shows_its_figures(done: Result) -> None:
    line, test = done.line, done.line["test"]
    fields = {"run", "model", "parameters", "data", "test", "rows_per_second", "seconds"}
    assert line.keys() == fields
    assert (line["model"], line["parameters"]) == (f"{line['run']}/model", 220_125)
    rows = {"train_rows": 819, "validation_rows": 88, "test_rows": 93}
    assert line["data"] == {"source": "parquet", **rows}
    assert test.keys() == {"rows", "pairs", "loss", "digit_accuracy", "sum_accuracy"}
    assert (test["rows"], test["pairs"]) == (93, 930)
    digit, total = (f"{100 * test[f'{head}_accuracy']:.2f} %" for head in ("digit", "sum"))
    assert f"test: digit {digit}, sum {total} (93 rows, 930 pairs)\n" in done.said
    assert re.findall(r"epoch (\d): loss ", done.said) == ["1", "2"]
    assert "no test or validation files found: holding out training rows instead" in done.said


def test_the_run_folder_holds_history_report_pictures_and_no_pickle(
    done: Result, run: Path, card: dict[str, Any], test_rows: pa.Table
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    history = history_of(run)
    assert [(line["epoch"], line["workers"]) for line in history] == [(1, 1), (2, 1)]
    assert (manifest["status"], manifest["metrics"]) == ("finished", done.line)
    assert {"ray", "torch", "pyarrow"} <= set(manifest["versions"])
    assert (manifest["workers"], manifest["threads"]) == ("1 CPU worker of 2 threads", 2)
    digits = dict(test_rows.select(["row_id", "digit"]).to_pandas().to_numpy().tolist())
    assert manifest["error_analysis"]["mistakes"]
    for mistake in manifest["error_analysis"]["mistakes"]:
        assert digits[mistake["row_id"]] == mistake["digit"]
    page = (run / "report.html").read_text()
    assert len([*run.glob("*.png")]) == page.count('src="data:image/') > 0
    assert percent(done.line["test"]["sum_accuracy"]) in page
    for path in run.rglob("*"):
        start = path.read_bytes()[:2] if path.is_file() else b""
        assert start not in (b"\x80\x04", b"\x80\x05", b"PK"), f"{path} is pickled"
    assert card["temperatures_in_weights"].keys() == {"digit", "sum"}
    # All that is published is measured after the calibration, and the history before it.
    assert card["test"] == manifest["metrics"]["test"]
    assert card["test"]["loss"] != history[-1]["test"]["loss"]
    right = sum(row[digit] for digit, row in enumerate(manifest["error_analysis"]["confusion"]))
    assert card["test"]["digit_accuracy"] == right / 93


def test_prometheus_sees_the_rows_of_all_epochs(done: Result) -> None:
    rows, run = 2 * done.line["data"]["train_rows"], done.line["run"]
    wait_until(lambda: metrics_of(run).get("ray_mnistsum_last_success_seconds"), 30)
    found = metrics_of(run)
    assert found["ray_mnistsum_rows_total"] == found["ray_mnistsum_planned_rows"] == rows


def check_in_plain_pytorch(line: dict[str, Any], test_rows: pa.Table) -> None:
    """Assert that the model of a run measures what its JSON line says."""
    images = torch.tensor(test_rows["image"].chunk(0).to_numpy_ndarray())
    digits = torch.tensor(test_rows["digit"].to_numpy())
    network = load_model(line["model"])
    right, loss = 0, 0.0
    with torch.no_grad():
        for number in range(10):
            numbers = torch.full((len(images),), number)
            digit, total = network({"image": images, "number": numbers})
            right += int((total.argmax(1) == digits + number).sum())
            for logits, true in ((digit, digits), (total, digits + number)):
                loss += F.cross_entropy(logits, true).item() / 20
    accuracy = (digit.argmax(1) == digits).float().mean().item()
    assert line["test"]["digit_accuracy"] == pytest.approx(accuracy)
    assert line["test"]["sum_accuracy"] == pytest.approx(right / 930)
    assert line["test"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_model_scores_in_plain_pytorch_what_the_run_says(
    done: Result, test_rows: pa.Table
) -> None:
    check_in_plain_pytorch(done.line, test_rows)


@pytest.mark.slow
def test_a_model_of_two_workers_scores_what_the_run_says(
    data: Path, test_rows: pa.Table, tmp_path: Path
) -> None:
    """Rank 0 calibrates it, and both measure it."""
    settings: dict[str, Any] = {"epochs": 1, "precision": "fp32", "num_workers": 2}
    trained = train_here(data=data, storage_path=tmp_path, **settings)
    check_in_plain_pytorch(trained.line, test_rows)


@pytest.mark.slow
def test_a_finished_run_is_resumed_without_training(
    run: Path, data: Path, card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before all was published, and the same rows now lie in other files."""
    copy = Path(shutil.copytree(run, tmp_path / "mine"))
    for lost in ("model/model.json", "model/model.safetensors", "report.html"):
        (copy / lost).unlink()
    manifest = json.loads((copy / "manifest.json").read_text()) | {"status": "running"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    rows, moved = pq.read_table(data), tmp_path / "moved"
    moved.mkdir()
    pq.write_table(rows[400:], moved / "a.parquet")
    settings = {"storage_path": tmp_path, "name": "mine", "resume": True, "data": moved}
    said = r"^--resume: the rows are not those of the run, from \S+ \(.*; name the same data, or"
    with pytest.raises(RequestError, match=said):
        train_here(**settings)
    pq.write_table(rows[:400], moved / "b.parquet")
    assert ": loss " not in train_here(**settings).said
    assert (copy / "report.html").exists()
    written = json.loads((copy / "model" / "model.json").read_text())
    assert written == card, "what was scored with it must go on as it was"
    assert not list(Path.cwd().iterdir()), "Ray deletes the working folder of a submitted job"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_same_files_give_the_same_model_in_a_bucket_where_they_are_read_in_each_epoch(
    data: Path, tmp_path: Path
) -> None:
    """Of two files, the rows of which the runs on a disk keep, and those of the bucket do not."""
    rows = pq.read_table(data)
    places = [locate(str(tmp_path / "rows"), "--data"), locate("s3://bucket/rows", "--data")]
    models = []
    for is_kept, place in zip((True, False), places, strict=True):
        for name, some in (("a", rows[:700]), ("b/c", rows[700:])):
            (place / f"{name}.parquet").write(to_parquet(some))
        settings: dict[str, Any] = {"threads": 1, "epochs": 2, "cache": is_kept}
        trained = train_here(data=place.display, storage_path=tmp_path / f"{is_kept}", **settings)
        assert ("read again in each epoch" in trained.said) != is_kept
        card = json.loads(Path(trained.line["model"], "model.json").read_text())
        models.append((card["trained_sha256"], card["sha256"], trained.line["test"]))
    assert models[0] == models[1]


@pytest.mark.nightly
def test_another_run_begins_with_its_weights(
    run: Path, card: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """Saved by `save_model`; with `--resume auto`, though there is nothing to resume."""
    saved = tmp_path / "saved"
    save_model(load_model(run), saved)
    settings: dict[str, Any] = {"data": data, "storage_path": tmp_path, "name": "tuned"}
    settings |= {"init_from": saved, "learning_rate": 0.001, "epochs": 1}
    train_here(**settings, resume="auto")
    (tuned,) = history_of(tmp_path / "tuned")
    assert tuned["train_loss"] < 0.9 * history_of(run)[-1]["train_loss"]
    recorded = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["init_from"]
    assert recorded == {"model": str(saved), "sha256": card["sha256"]}


@pytest.mark.slow
def test_an_infinite_loss_stops_every_rank_at_once_and_raises_in_its_thread(
    cluster: str, data: Path, tmp_path: Path
) -> None:
    """Without another attempt; beside a loop of asyncio, as in a notebook; with data at a URI."""
    place = locate("s3://bucket/training/rows.parquet", "--data")
    place.write(data.read_bytes())
    settings = {"data": place.display, "storage_path": tmp_path, "name": "broken"}
    settings |= {"num_workers": 2, "learning_rate": 9e5, "max_failures": 5}
    raised: list[str] = []

    async def train() -> None:
        with pytest.raises(RunError) as error:
            train_here(**settings)
        raised.append(str(error.value))

    thread = threading.Thread(target=lambda: asyncio.run(train()), daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    (said,) = raised
    infinite = r"epoch \d, step .* of .*: the loss is (nan|inf).*; lower --learning-rate \(now 9000"
    assert re.match(infinite, said)
    assert json.loads((tmp_path / "broken" / "manifest.json").read_text())["status"] == "failed"
    assert len([*tmp_path.glob("broken/checkpoints/*")]) <= 1
    with pytest.raises(RequestError, match="exists; continue it with --resume"):
        train_here(**settings)


class Raising(ray.train.UserCallback):
    """A tracking server that is gone."""

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        raise ConnectionError("the tracking server is gone")


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_callback_that_raises_ends_the_run(data: Path, tmp_path: Path) -> None:
    config = TrainConfig(data=str(data), storage_path=str(tmp_path), name="mine", epochs=2)
    said = "^Ray Train gave up: ConnectionError: the tracking server is gone; checkpoints are .*me$"
    with pytest.raises(RunError, match=said):
        fit(config, [Raising()])
    assert json.loads((tmp_path / "mine/manifest.json").read_text())["status"] == "failed"


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_mnist_is_learned_as_well_as_by_the_original(tmp_path: Path) -> None:
    """MNIST names a folder with it; else it is downloaded."""
    data = os.environ.get("MNIST", "mnist")
    test = train_here(data=data, recipe="quick", storage_path=tmp_path).line["test"]
    assert test["digit_accuracy"] >= 0.9945
    assert test["sum_accuracy"] >= 0.9940


@contextmanager
def one_cpu_is_held() -> Iterator[None]:
    """Another reserves a CPU of the cluster."""
    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    try:
        yield
    finally:
        remove_placement_group(group)


@pytest.mark.usefixtures("cluster")
def test_a_plan_sees_the_cpus_that_are_free() -> None:
    with one_cpu_is_held():
        assert free_cpus() == [1]
    assert free_cpus() == [2]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_that_gets_no_cpu_ends_with_75_and_says_what_is_missing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those for its workers, nor one for what reads the rows."""
    monkeypatch.setattr(job, "_LEAST_WAIT_SECONDS", 1.0)
    free = r"{} CPUs? and 0 GPUs are free \(2 CPUs and 0 GPUs on 1 node\)"
    settings: dict[str, Any] = {"storage_path": tmp_path, "wait_seconds": 1}
    with one_cpu_is_held():
        said = "timed out after 0.25 seconds waiting for 2 workers; " + free.format(1)
        with pytest.raises(TryAgainError, match=said):
            train_here(data="sample", name="begun", num_workers=2, **settings)
        assert json.loads((tmp_path / "begun/manifest.json").read_text())["status"] == "failed"
        said = r"^needs 1 CPU, for the tasks that read rows, but after \d+ s only " + free.format(0)
        with one_cpu_is_held(), pytest.raises(TryAgainError, match=said):
            train_here(data=data, name="not-begun", **settings)
    assert not (tmp_path / "not-begun/manifest.json").exists()
    wait_until(lambda: ray.available_resources().get("CPU") == 2)


ROWS_OF_BLOCK = 70


class Recorder(Worker):
    """Keeps the batches that its worker trains, and their learning rates."""

    def __init__(self, totals: RowTotals) -> None:
        torch.set_num_threads(1)
        task, parameters = mnist(dropout=0, distortion=1), hyperparameters(batch_size=32)
        super().__init__(task, parameters, totals, ROWS_OF_BLOCK, CPU, "fp32", SILENT)
        self.steps: list[tuple[Batch, float]] = []

    def _step(self, batch: Batch, rows: int, global_rows: int, learning_rate: float) -> Any:
        own = {name: values[:rows] for name, values in batch.items()}  # of none are two zeros
        self.steps.append((own, learning_rate))
        return super()._step(batch, rows, global_rows, learning_rate)


def evaluated(worker: Worker, totals: RowTotals) -> tuple[dict[str, float], list[int]]:
    """The metrics of the test rows of all ranks, and the ids of those that are analysed."""
    held_out = HeldOutRows(worker.task, "test", totals, CPU, SILENT)
    metrics = held_out.evaluate(worker.network, bf16=False)
    analysed = held_out.gather_analysed(worker.network, bf16=False)
    return metrics, sorted(torch.cat([batch["row_id"] for batch, _ in analysed]).tolist())


def train_and_evaluate(config: dict[str, Any]) -> None:
    """Train an epoch on each worker; rank 0 saves the figures, its weights and the steps of all."""
    worker = Recorder(config["totals"])
    train_loss = worker.train_epoch(0)["train_loss"]
    broadcast_state(worker.network)
    found = evaluated(worker, config["totals"])
    of_ranks: list[Any] = [None] * worker.world_size
    torch.distributed.all_gather_object(of_ranks, worker.steps)
    if worker.rank == 0:
        torch.save((of_ranks, copy_weights(worker.network), train_loss, found), config["file"])


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_three_workers_of_unequal_shards_train_as_one_that_has_their_batches(
    sample: pa.Table, tmp_path: Path
) -> None:
    """In half of the steps one of them has no rows. Bits: tests/integration/test_faults.py."""
    rows = sample[::30].append_column("path", pa.array([""] * 167))
    columns = MnistSum().training_columns
    rows = without_origin(decode(rows, columns, {key: key for key in columns}, {}))
    totals, file = RowTotals.of(rows["row_id"].to_numpy()), str(tmp_path / "trained.pt")
    starts = range(0, 167, ROWS_OF_BLOCK)
    dataset = ray.data.from_blocks([rows[start:][:ROWS_OF_BLOCK] for start in starts])
    TorchTrainer(
        train_and_evaluate,
        train_loop_config={"totals": totals, "file": file},
        datasets={"train": dataset, "test": dataset},
        dataset_config=EveryRow(),
        scaling_config=ray.train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path)),
    ).fit()
    of_ranks, trained, train_loss, (metrics, analysed) = torch.load(file, weights_only=True)
    sizes = [[len(batch["digit"]) for batch, _ in steps] for steps in of_ranks]
    assert sizes == [[10] * 7, [11] * 6 + [4], [11, 11, 5] + [0] * 4]

    def compute_alone() -> Any:
        alone, loss = Recorder(totals), 0.0
        for shares in zip(*of_ranks, strict=True):
            batches, (rate, *_) = zip(*shares, strict=True)
            batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
            count = len(batch["digit"])
            loss += alone._step(batch, count, count, rate).item()
        weights = copy_weights(alone.network)
        alone.network.load_state_dict(trained)
        return weights, loss / 167, evaluated(alone, totals)

    expected, expected_loss, (expected_metrics, expected_rows) = as_worker(compute_alone, dataset)
    torch.manual_seed(0)
    # With wrong weights of the ranks layers differ by 4 to 20 %, else by 0.5 %.
    for name, start in copy_weights(mnist().network()).items():
        change = (expected[name] - start).norm()
        assert (trained[name] - expected[name]).norm() < 0.03 * change, name
    assert train_loss == pytest.approx(expected_loss, rel=0.001)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert analysed == expected_rows == sorted(rows["row_id"].to_pylist())


@pytest.mark.slow
def test_the_config_of_a_run_trains_the_same_model_also_after_a_signal(
    done: Result, run: Path, tmp_path: Path
) -> None:
    """On a node with more CPUs, all of which a new run would take: other bits than of two.

    This test and the next one stand last, since they leave the cluster of the others.
    """
    file, again = run / "config.yaml", tmp_path / "again"
    flags: list[Any] = ["--storage-path", tmp_path, "--name", "again"]
    with nodes(3) as larger, joined(larger):
        begun = Job("train", "--config", file, *flags, address=larger.address)
        begun.wait_until(lambda: [*again.glob("checkpoints/*/epoch_00001/*.sha256")])
        begun.process.send_signal(signal.SIGINT)
        stopped = begun.wait()
        assert stopped.code == 128 + signal.SIGINT, stopped.err
        assert f"--storage-path {tmp_path} --name again --resume\n" in stopped.err
        assert "Traceback" not in stopped.err
        assert json.loads((again / "manifest.json").read_text())["status"] == "stopped"
        resumed = train_here(storage_path=tmp_path, name="again", resume=True)
    assert re.search("resuming after epoch [12], on 1 worker", resumed.said)
    assert resumed.line["test"] == done.line["test"]
    assert resumed.weights() == done.weights()
    configs = [
        config_from_args(TrainConfig, ["--config", str(path / file.name)]) for path in (run, again)
    ]
    assert configs[0] == configs[1]


@pytest.mark.nightly
def test_without_cuda_a_job_runs_on_cpus_and_says_so(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray counts a GPU on a Mac, and where PyTorch is a CPU build."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")  # a card that no machine has
    ray.shutdown()
    start_cluster(num_cpus=2, num_gpus=1)
    said = "^--use-gpu true: Ray counts GPUs here, but PyTorch has no CUDA that fits .*; install"
    with pytest.raises(RequestError, match=said):
        train_here(data=data, storage_path=tmp_path, use_gpu=True, wait_seconds=0)
    scored = score_here(model, tmp_path / "out", data, number_column="digit")
    assert scored.line["scored_rows"] == 1000
    assert scored.said.count("running on CPUs: Ray counts GPUs here") == 1
    assert "1 CPU worker" in scored.said
    ray.shutdown()
