"""Train a two-head MNIST network on Ray and score Parquet files with it; every row is counted.

The Python API does what the jobs do from a shell:

    from mnistsum_ray import ScoreConfig, TrainConfig, fit, load_model, predict, score

    line = fit(TrainConfig(data="sample"))
    score(ScoreConfig(model=line["run"], input=("pairs/",), output="predictions/"))
    predictions = predict(load_model(line["run"]), images, numbers)  # uint8[n, 28, 28] and int64[n] in 0..9
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mnistsum_ray.reporting.versions import __version__ as __version__

__all__ = ["RequestError", "RunError", "ScoreConfig", "TrainConfig", "fit", "load_model", "predict", "score"]

if TYPE_CHECKING:
    from mnistsum_ray.api import fit, load_model, predict, score
    from mnistsum_ray.config import ScoreConfig, TrainConfig
    from mnistsum_ray.errors import RequestError, RunError


def __getattr__(name: str) -> Any:
    # Imports on first use: torch and Ray take seconds to import, and `--help` needs neither.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors" if name in ("RequestError", "RunError") else "config" if name[0].isupper() else "api"
    return getattr(import_module(f"{__name__}.{module}"), name)
