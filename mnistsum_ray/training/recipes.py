"""TODO training.recipes"""

from typing import Any, Final

SMALL_ROWS: Final = 20_000
"""Below so many training rows, smaller batches and more epochs: the sum head needs its number of steps."""


def recipe_defaults(name: str, *, small: bool) -> dict[str, Any]:
    """What is meant where nothing is said."""
    if name == "long":
        size = {"epochs": 40, "batch_size": 64} if small else {"epochs": 30, "batch_size": 128}
        augmentation = {"max_shift": 0, "distortion": 1.0, "label_smoothing": 0.05, "dropout": 0.25}
    else:
        size = {"epochs": 6, "batch_size": 64} if small else {"epochs": 5, "batch_size": 256}
        augmentation = {"max_shift": 1 if small else 2, "distortion": 0.0, "label_smoothing": 0.0, "dropout": 0.0}
    return size | augmentation | {"sum_head_steps": 4_000 if small else 20_000}
