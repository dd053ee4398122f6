"""Train the two-head MNIST network on Ray and score Parquet with it; every row is counted.

From Python, what the jobs do from a shell:

    from mnistsum_ray import ScoreConfig, TrainConfig, fit, load_model, predict, score

    line = fit(TrainConfig(data="sample"))
    score(ScoreConfig(model=line["run"], input=("pairs/",), output="predictions/"))
    answers = predict(load_model(line["run"]), images, numbers)  # uint8[n, 28, 28] and int64[n] in 0..9
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["RequestError", "RunError", "ScoreConfig", "TrainConfig", "fit", "load_model", "predict", "score"]

if TYPE_CHECKING:
    from mnistsum_ray.api import fit, load_model, predict, score
    from mnistsum_ray.config import ScoreConfig, TrainConfig
    from mnistsum_ray.errors import RequestError, RunError


def __getattr__(name: str) -> Any:
    # Only when asked for: torch and Ray take seconds to import, which `--help` should not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors" if name in ("RequestError", "RunError") else "config" if name[0].isupper() else "api"
    return getattr(import_module(f"{__name__}.{module}"), name)
