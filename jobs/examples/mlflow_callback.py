"""Train, and log each epoch and the model to MLflow. Needs: pip install mlflow

export MLFLOW_TRACKING_URI=http://127.0.0.1:5000    (else mlflow.db in the working folder)
python jobs/examples/mlflow_callback.py --data sample    (any flags of jobs/train.py)
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from ray.train import UserCallback

from mnistsum_ray import TrainConfig, config_from_args, fit, load_model, save_model


class MLflow(UserCallback):
    def __init__(self, uri: str, run: str) -> None:
        self.uri, self.run = uri, run

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        line = metrics[0]  # of rank 0; all ranks report the same
        values = {"train/loss": line["train_loss"]}
        for split in ("validation", "test"):
            values |= {f"{split}/{name}": value for name, value in line[split].items()}
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # in Ray's process; 7 take minutes
        mlflow.set_tracking_uri(self.uri)
        with suppress(mlflow.MlflowException):  # a server that is away must not end the training
            mlflow.log_metrics(values, step=line["epoch"], run_id=self.run)


config = config_from_args(TrainConfig, sys.argv[1:])
uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').resolve()}")
signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` ends the run, too
with mlflow.start_run(run_name=config.name) as run:  # FAILED if something is raised
    mlflow.log_params(config.model_dump())
    trained = fit(config, callbacks=[MLflow(uri, run.info.run_id)])
    with TemporaryDirectory() as folder:  # the model may be in a store
        save_model(load_model(trained.model), folder)
        mlflow.log_artifacts(folder, "model")
