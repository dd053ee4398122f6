"""One picture that a person draws: made what MNIST's images are, and its prediction."""

import io
import os
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mnistsum_ray.config import JobConfig, Place
from mnistsum_ray.data.columns.base import Array
from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist import NUMBERS, SIDE
from mnistsum_ray.reporting.results import Result
from mnistsum_ray.storage.uri import as_request_error, locate_existing

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import nn

Picture: TypeAlias = Place | bytes | Image.Image  # a file, a URI, the bytes of a file, …

SURE: Final = 0.9  # probability of a digit from which on an answer is sure

# They are only pixels: for EPS, Pillow would run another program.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Ink below this share of the strongest is grain, and becomes 0; above 1 - this share it is 1.
_FAINT: Final = 0.25


class PredictConfig(JobConfig):
    """Config of a prediction for one picture."""

    picture: str
    """file or URI of a picture of one digit on a plain background"""
    number: int
    """number that is added to the digit, in 0..9"""
    model: str
    """folder or URI of a training run, or of its model folder"""


class PicturePrediction(Result):
    """The answers for one picture and a number."""

    number: int
    digit: int
    digit_prob: float
    sum: int
    sum_prob: float
    consistent: bool  # whether sum = digit + number
    unsure: bool  # whether the digit's probability is below SURE


def predict(model: "nn.Module | Place", picture: Picture, number: int) -> PicturePrediction:
    """Predict the digit of a picture, and digit + number, in this process.

    The model is one of `load_model`, or what that takes.

    RequestError: there is no such picture, model or number, or nothing is drawn.
    TryAgainError: the storage does not answer.
    """
    if number not in range(NUMBERS):
        raise RequestError(f"the number is {number}, not one of 0..{NUMBERS - 1}")
    pixels = prepare_picture(picture)  # before the import of PyTorch: a refusal comes at once

    from mnistsum_ray.api import load_model
    from mnistsum_ray.mnist.task import MnistSum
    from mnistsum_ray.model.inference import predict_rows

    network = load_model(model) if isinstance(model, str | os.PathLike) else model
    rows = {"image": pixels[None], "number": np.array([number])}
    found = predict_rows(MnistSum(), network, rows, batch_size=1)
    answers = {name: values[0].item() for name, values in found.items()}
    unsure = answers["digit_prob"] < SURE
    answers |= {"number": int(number), "digit": answers["pred_digit"], "sum": answers["pred_sum"]}
    return PicturePrediction(unsure=unsure, **answers)


def prepare_picture(picture: Picture) -> Array:
    """Prepare a picture as MNIST's images were, white on black: uint8[28, 28].

    Ink is what is darker or lighter than the edge. It is scaled to fit 20 x 20 pixels, and centred
    by its mass (LeCun et al. 1998).

    RequestError: there is no such file, it is no picture, or nothing is drawn on it.
    TryAgainError: the storage does not answer.
    """
    name, grey = _read_grey(picture)
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(edge))
    strongest = ink.max()
    if strongest < 16:  # of 255
        raise RequestError(
            f"{name}: nothing is drawn on it that is darker or lighter than its edge"
        )
    ink = ((ink / strongest - _FAINT) / (1 - 2 * _FAINT)).clip(0, 1)
    drawn = Image.fromarray(ink)
    drawn = drawn.crop(drawn.getbbox())
    scale = 20 / max(drawn.size)
    width = max(1, round(scale * drawn.width))  # a line may be thinner than a pixel
    height = max(1, round(scale * drawn.height))
    digit = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    digit *= 255 / digit.max()  # thin strokes have become faint
    top, left = _start_when_centred(digit.sum(axis=1)), _start_when_centred(digit.sum(axis=0))
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[top : top + height, left : left + width] = digit.round()
    return pixels


def _read_grey(picture: Picture) -> tuple[str, Array]:
    """Return a picture's name for messages, and its brightness: float32[h, w] in 0..255."""
    name = "the picture"
    if isinstance(picture, str | os.PathLike):
        file = locate_existing(os.fspath(picture), "picture")
        with as_request_error():
            name, picture = file.display, file.read_bytes()
    try:
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture), formats=_FORMATS)
        image = ImageOps.exif_transpose(picture).convert("RGBA")
    except Exception as error:  # Pillow's decoders raise many types
        problem = f"cannot be read as a picture ({type(error).__name__})"
        raise RequestError(f"{name}: {problem}; save it as PNG") from None
    image.thumbnail((1024, 1024))  # only ever smaller
    white = Image.new("RGBA", image.size, "white")
    return name, np.asarray(Image.alpha_composite(white, image).convert("L"), np.float32)


def _start_when_centred(mass: Array) -> int:
    """Return where a digit of this mass by row or column begins if its centre is in the middle."""
    centre = np.average(np.arange(len(mass)), weights=mass)
    return int(np.clip(round(SIDE / 2 - centre), 0, SIDE - len(mass)))
