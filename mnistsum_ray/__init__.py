"""Train a two-head MNIST network on Ray and score Parquet files with it; every row is counted.

The Python API does what the jobs do from a shell:

    from mnistsum_ray import ScoreConfig, TrainConfig, fit, load_model, predict, score

    trained = fit(TrainConfig(data="sample"))
    score(ScoreConfig(model=trained.run, input=("pairs/",), output="scored/"))
    answer = predict(trained.run, "seven.png", 5)  # a picture and a number
    table = predict_rows(load_model(trained.run), frame)  # pandas, Polars, Arrow, a Ray Dataset
    pixels = prepare_picture("seven.png")  # uint8[28, 28], as training and scoring take images
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

# Not read from the installed package: a submitted job runs in a copy of the source.
__version__: Final = "0.1.0"

if TYPE_CHECKING:
    from mnistsum_ray.api import fit, load_model, predict, predict_rows, save_model, score
    from mnistsum_ray.config import ScoreConfig, TrainConfig
    from mnistsum_ray.data.picture import prepare_picture
    from mnistsum_ray.errors import RequestError, RunError, TryAgainError
    from mnistsum_ray.reporting.results import ScoreResult, TrainResult

__all__ = [
    "RequestError",
    "RunError",
    "ScoreConfig",
    "ScoreResult",
    "TrainConfig",
    "TrainResult",
    "TryAgainError",
    "fit",
    "load_model",
    "predict",
    "predict_rows",
    "prepare_picture",
    "save_model",
    "score",
]


def __getattr__(name: str) -> Any:
    # Imports on first use: torch and Ray take seconds to import, and `--help` needs neither.
    modules = ("errors", "config", "api") if name in __all__ else ()
    for module in modules:
        found = import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
