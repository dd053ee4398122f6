"""Recipes: hyperparameters that a run has where its config does not set them."""

from typing import Any, Final

SMALL_ROWS: Final = 20_000
"""Below this number of training rows a run has smaller batches and more epochs: the sum head needs its number of steps."""


def recipe_defaults(name: str, *, small: bool) -> dict[str, Any]:
    """Hyperparameters of the recipe `quick`, `short` or `long`; `small` for less than SMALL_ROWS training rows."""
    common = {"learning_rate": 0.02, "sum_head_steps": 4_000 if small else 20_000}
    if name == "long":
        size = {"epochs": 40, "batch_size": 64} if small else {"epochs": 30, "batch_size": 128}
        return common | size | {"distortion": 1.0, "label_smoothing": 0.05, "dropout": 0.25}
    common |= {"distortion": 0.5, "label_smoothing": 0.0, "dropout": 0.0}
    if small:
        return common | {"epochs": 3 if name == "quick" else 6, "batch_size": 64}
    if name == "quick":
        return common | {"epochs": 2, "batch_size": 256, "learning_rate": 0.06, "sum_head_steps": 2_000}
    return common | {"epochs": 5, "batch_size": 256}
