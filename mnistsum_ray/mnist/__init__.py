"""The built-in task: the digit of an image of MNIST, and digit + number."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mnistsum_ray.mnist.network import TwoHeadCNN as TwoHeadCNN
    from mnistsum_ray.mnist.network import prepare_images as prepare_images
    from mnistsum_ray.mnist.picture import PicturePrediction as PicturePrediction
    from mnistsum_ray.mnist.picture import predict as predict
    from mnistsum_ray.mnist.picture import prepare_picture as prepare_picture
    from mnistsum_ray.mnist.task import MnistSum as MnistSum

SIDE: Final = 28  # pixels of an image, down and across
DIGITS: Final = 10
NUMBERS: Final = 10  # 0..9: a training row gets one at random, a row to be scored has its own
SUMS: Final = DIGITS + NUMBERS - 1

HEADS: Final = ("digit", "sum")
"""What the network answers, in the order of its outputs: as in `pred_digit`, `digit_prob`."""

_NAMES: Final = {
    "network": "TwoHeadCNN prepare_images",
    "picture": "PicturePrediction predict prepare_picture",
    "task": "MnistSum",
}
"""Exported names by module."""

__all__ = " ".join(_NAMES.values()).split()


def __getattr__(name: str) -> Any:
    # As in mnistsum_ray: torch takes seconds to import.
    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
