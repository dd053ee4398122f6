"""Look for the best learning rate with Ray Tune. Needs: pip install 'ray[tune]'

python jobs/examples/tune.py --data sample --epochs 3
"""

import argparse
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from mnistsum_ray import TrainConfig, fit

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="sample", help="a name, or an absolute path or URI")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--at-once", type=int, default=1, help="trials; of several each has one CPU")
args = parser.parse_args()
storage = str(Path("tuned").resolve())


def trial(chosen: dict[str, Any]) -> None:
    """Train a run of the trial's name and report each epoch, where the scheduler may end it."""
    settings = {"data": args.data, "epochs": args.epochs, "storage_path": storage, **chosen}
    settings["name"] = tune.get_context().get_trial_name()
    # Beside the little that the trials hold, one alone takes the CPUs that are free, others one.
    threads = None if args.at_once == 1 else 1
    config = TrainConfig(**settings, num_workers=1, threads=threads)
    fit(config, callbacks=[TuneReportCallback()])


tuner = tune.Tuner(
    tune.with_resources(trial, {"CPU": 0.1}),
    param_space={"learning_rate": tune.grid_search([0.02, 0.05])},
    tune_config=tune.TuneConfig(
        metric="validation/sum_accuracy",
        mode="max",
        # Beyond the last epoch, so that good trials end by themselves. The workers of a trial that
        # Tune ends keep their CPUs until Ray's dashboard shows that it has ended.
        scheduler=ASHAScheduler(time_attr="epoch", max_t=args.epochs + 1),
        max_concurrent_trials=args.at_once,
    ),
)
print(tuner.fit().get_best_result().config)
