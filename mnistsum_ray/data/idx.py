"""MNIST's own files: find them, read them, and download them.

Format: https://yann.lecun.com/exdb/mnist/
"""

import math
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.errors import RequestError

IDX_FILES: Final = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)

_DOWNLOAD_TIMEOUT_SECONDS: Final = 3
"""Timeout of the connection and of each read; it does not limit the download as a whole."""


def find_idx(root: Path) -> Path | None:
    """The folder with IDX files: `root`/MNIST/raw or `root`/raw, as in torchvision, or `root`."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if any((folder / name).exists() for names in IDX_FILES for name in names):
            return folder
    return None


def read_idx(folder: Path) -> Iterator[tuple[Pixels, Pixels, str]]:
    """Images uint8[n, 28, 28], labels uint8[n] and their file; of training, then of the test.

    RequestError: a file is missing, is not IDX, or does not match the others.
    """
    for images_file, labels_file in IDX_FILES:
        images = _read_idx_file(folder / images_file, (SIDE, SIDE))
        labels = _read_idx_file(folder / labels_file, ())
        if len(images) != len(labels):
            differ = f"has {len(labels):,} labels, and {images_file} {len(images):,} images"
            raise RequestError(f"{folder / labels_file}: {differ}")
        yield images, labels, labels_file


def _read_idx_file(path: Path, shape: tuple[int, ...]) -> Pixels:
    """The n elements of this shape of an IDX file: uint8[n, *shape]."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    # Two zeros, the type of bytes, the number of dimensions, and each of these.
    count = int.from_bytes(data[4:8], "big")
    header = bytes((0, 0, 8, 1 + len(shape))) + struct.pack(f">{1 + len(shape)}I", count, *shape)
    if not data.startswith(header) or len(data) != len(header) + count * math.prod(shape):
        kind = "n" + "".join(f" x {side}" for side in shape)
        raise RequestError(f"{path}: is not an IDX file of unsigned bytes, {kind}, or is damaged")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(count, *shape)


def download_mnist(root: Path) -> Path:
    """Download MNIST to the folder `root`/MNIST/raw, which appears only when it is complete.

    OSError, RuntimeError: no mirror has some file, or they cannot be written. Without a network
    this fails within seconds.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and most runs do not download

    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)  # torchvision would wait for minutes
    try:
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            MNIST(temporary, download=True)
            if find_idx(root) is None:  # otherwise another run was faster
                Path(temporary, "MNIST").rename(root / "MNIST")
    finally:
        socket.setdefaulttimeout(before)
    return root / "MNIST" / "raw"
