"""The Python API: train, score and predict in one process, in any order."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray import tune
from ray.train import UserCallback

from mnistsum_ray import (
    RequestError,
    ScoreConfig,
    TrainConfig,
    fit,
    load_model,
    predict_rows,
    score,
)
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs

ROWS = 300


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=1), print)
    return folder


def test_an_invalid_request_raises_request_error_which_names_the_flag(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RequestError, match=r"--data .*/a--b/--seed: there is no such file or folder"
    ):
        fit(TrainConfig(data=str(tmp_path / "a--b" / "--seed"), storage_path=str(tmp_path)))
    with pytest.raises(
        RequestError, match=r"^--image-column picture: no file of --input has such a column"
    ):
        score(
            ScoreConfig(
                model=str(model),
                input=(str(pairs),),
                output=str(tmp_path / "out"),
                image_column="picture",
            )
        )


@pytest.mark.slow
def test_callbacks_get_each_report(cluster: str, tmp_path: Path, write_rows: Any) -> None:
    reports = tmp_path / "reports.jsonl"
    settings: dict[str, Any] = {
        "data": str(write_rows(500)),
        "epochs": 2,
        "sum_head_steps": 5,
        "storage_path": str(tmp_path),
    }

    class Keep(UserCallback):
        def after_report(
            self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
        ) -> None:
            with reports.open("a") as file:
                file.write(json.dumps(metrics[0]) + "\n")

    fit(TrainConfig(**settings, name="other"), callbacks=[Keep()])
    history = tmp_path / "other" / "history.jsonl"
    kept, lines = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (reports, history)
    )
    assert [report["epoch"] for report in kept] == [1, 2]
    assert kept == [
        {name: line[name] for name in ("epoch", "train_loss", "validation", "test")}
        for line in lines
    ]


@pytest.mark.slow
def test_trials_of_ray_tune(cluster: str, tmp_path: Path, write_rows: Any) -> None:
    """Two at a time, on one cluster."""
    settings: dict[str, Any] = {
        "data": str(write_rows(500)),
        "epochs": 1,
        "storage_path": str(tmp_path),
    }

    def trial(config: dict[str, float]) -> None:
        result = fit(TrainConfig(**settings, learning_rate=config["rate"]))
        tune.report({"digit_accuracy": result.test.digit_accuracy, "run": result.run})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.1}),
        param_space={"rate": tune.grid_search([1e-5, 0.05])},
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune")),
    )
    results = tuner.fit()
    assert not results.errors
    best = results.get_best_result("digit_accuracy", "max")
    assert best.config == {"rate": 0.05}
    assert (Path(best.metrics["run"]) / "manifest.json").exists()


@pytest.mark.slow
def test_a_ray_dataset_comes_back_with_predictions(cluster: str, model: Path, pairs: Path) -> None:
    """All rows in their order, though the task of the first ones is slow. The dataset of the user keeps its own options."""
    table = pq.read_table(pairs / "part-00000.parquet")

    def wait_first(block: pa.Table) -> pa.Table:
        time.sleep(2 if block["row_id"][0].as_py() == table["row_id"][0].as_py() else 0)
        return block

    blocks = ray.data.from_arrow([table.slice(start, 50) for start in range(0, ROWS, 50)])
    dataset = blocks.map_batches(wait_first, batch_format="pyarrow")
    answered = pa.concat_tables(ray.get(predict_rows(model, dataset).to_arrow_refs()))
    assert not dataset.context.execution_options.preserve_order
    expected = predict_rows(load_model(model), table)
    for name in ("row_id", "pred_digit", "pred_sum", "consistent", "reason"):
        assert answered[name].to_pylist() == expected[name].to_pylist(), name
