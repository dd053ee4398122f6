"""Kinds of columns that a task may have, a file each. To add one, copy integers.py."""

from mnistsum_ray.data.columns.base import Column
from mnistsum_ray.data.columns.classes import Classes
from mnistsum_ray.data.columns.images import Images
from mnistsum_ray.data.columns.integers import Integers
from mnistsum_ray.data.columns.numbers import Numbers
from mnistsum_ray.data.columns.photos import Photos
from mnistsum_ray.data.columns.tokens import Tokens

__all__ = ["Classes", "Column", "Images", "Integers", "Numbers", "Photos", "Tokens"]
