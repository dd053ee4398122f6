"""Train a network on Ray and score Parquet files with it; every row is counted.

What is learned is a task. The built-in one is a two-head network for MNIST; write a `Task` for rows
of your own, of columns `Images`, `Photos`, `Integers` and `Numbers`, and give it as `task=Shapes`.

The Python API does what the jobs do from a shell:

    from mnistsum_ray import ScoreConfig, TrainConfig, fit, score
    from mnistsum_ray import load_model, predict_rows

    trained = fit(TrainConfig(data="sample"))
    score(ScoreConfig(model=trained.run, input=("pairs/",), output="scored/"))
    table = predict_rows(load_model(trained.run), rows)  # pandas, Polars, Arrow, a Ray Dataset
    config = config_from_args(TrainConfig, ["--data", "sample"])  # the flags of a job

Progress goes through the logger "mnistsum_ray", by default to standard error.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

# The installed package may not be there: a submitted job runs in a copy of the source.
__version__: Final = "0.1.0"

if TYPE_CHECKING:
    from mnistsum_ray.api import fit as fit
    from mnistsum_ray.api import load_model as load_model
    from mnistsum_ray.api import predict_rows as predict_rows
    from mnistsum_ray.api import save_model as save_model
    from mnistsum_ray.api import score as score
    from mnistsum_ray.cli import config_from_args as config_from_args
    from mnistsum_ray.config import ScoreConfig as ScoreConfig
    from mnistsum_ray.config import TrainConfig as TrainConfig
    from mnistsum_ray.data.columns import Classes as Classes
    from mnistsum_ray.data.columns import Column as Column
    from mnistsum_ray.data.columns import Images as Images
    from mnistsum_ray.data.columns import Integers as Integers
    from mnistsum_ray.data.columns import Numbers as Numbers
    from mnistsum_ray.data.columns import Photos as Photos
    from mnistsum_ray.data.columns import Tokens as Tokens
    from mnistsum_ray.data.randomness import RowRandom as RowRandom
    from mnistsum_ray.errors import RequestError as RequestError
    from mnistsum_ray.errors import RowCountError as RowCountError
    from mnistsum_ray.errors import RunError as RunError
    from mnistsum_ray.errors import RunInterrupted as RunInterrupted
    from mnistsum_ray.errors import TaskError as TaskError
    from mnistsum_ray.errors import TryAgainError as TryAgainError
    from mnistsum_ray.reporting.results import ScoreResult as ScoreResult
    from mnistsum_ray.reporting.results import TrainResult as TrainResult
    from mnistsum_ray.task import Batch as Batch
    from mnistsum_ray.task import Findings as Findings
    from mnistsum_ray.task import NamedData as NamedData
    from mnistsum_ray.task import Settings as Settings
    from mnistsum_ray.task import Task as Task

_NAMES: Final = {
    "api": "fit load_model predict_rows save_model score",
    "cli": "config_from_args",
    "config": "ScoreConfig TrainConfig",
    "data.columns": "Classes Column Images Integers Numbers Photos Tokens",
    "data.randomness": "RowRandom",
    "errors": "RequestError RowCountError RunError RunInterrupted TaskError TryAgainError",
    "reporting.results": "ScoreResult TrainResult",
    "task": "Batch Findings NamedData Settings Task",
}
"""Exported names by module."""

__all__ = " ".join(_NAMES.values()).split()


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def __getattr__(name: str) -> Any:
    # Imports on first use: torch and Ray take seconds to import, and `--help` needs neither.
    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
