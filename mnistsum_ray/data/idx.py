"""MNIST's own files: find them, read them, and download them.

Format: https://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import socket
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.images import SIDE, Pixels, decode_labelled, pixels_array
from mnistsum_ray.errors import RequestError

IDX_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_DOWNLOAD_TIMEOUT_SECONDS: Final = 3
"""Timeout of the connection and of each read; it does not limit the download as a whole."""


def find_idx(root: Path) -> Path | None:
    """The folder with IDX files: `root`/MNIST/raw or `root`/raw, as in torchvision, or `root`; None where there is none."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if any((folder / (name + suffix)).exists() for name in IDX_FILES for suffix in ("", ".gz")):
            return folder
    return None


def read_idx(folder: Path) -> tuple[Pixels, npt.NDArray[np.int8], dict[int, str], int]:
    """Images, digits and bad rows of a folder, as of `decode_labelled`; and the number of test rows,
    which are the last.

    A file that is missing, is not IDX, or does not match the others is a RequestError that names it.
    """
    train_images, test_images = (_read_idx_file(folder, name, (SIDE, SIDE)) for name in IDX_FILES[::2])
    train_digits, test_digits = (_read_idx_file(folder, name, ()) for name in IDX_FILES[1::2])
    if (len(train_images), len(test_images)) != (len(train_digits), len(test_digits)):
        raise RequestError(f"{folder}: its label files have not as many labels as its image files images")
    pixels = pixels_array(np.concatenate([train_images, test_images]))
    labels = pa.array(np.concatenate([train_digits, test_digits]))
    return *decode_labelled(pixels, labels), len(test_images)


def _read_idx_file(folder: Path, name: str, shape: tuple[int, ...]) -> Pixels:
    """The n elements of this shape of an IDX file, gzipped or not: uint8[n, *shape].

    torchvision reads no gzipped files, and has no message for a damaged one.
    """
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
    if not path.is_file():  # reading a pipe would wait for its writer
        raise RequestError(f"{folder}: {name} is missing, gzipped or not")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    # Two zeros, the type of bytes, the number of dimensions, and each of these.
    count = int.from_bytes(data[4:8], "big")
    header = bytes((0, 0, 8, 1 + len(shape))) + struct.pack(f">{1 + len(shape)}I", count, *shape)
    if not data.startswith(header) or len(data) != len(header) + count * math.prod(shape):
        kind = "n" + "".join(f" x {side}" for side in shape)
        raise RequestError(f"{path}: is not an IDX file of unsigned bytes, {kind}, or is damaged")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(count, *shape)


def download_mnist(root: Path) -> Path:
    """Download MNIST to the folder `root`/MNIST/raw, which appears only when it is complete.

    torchvision knows mirrors and MD5 sums. Without a network this fails within seconds.

    Raises:
        OSError, RuntimeError: no mirror has some file, or they cannot be written.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and most runs do not download

    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)  # torchvision would wait for minutes
    try:
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            MNIST(temporary, download=True)
            try:
                Path(temporary, "MNIST").rename(root / "MNIST")
            except OSError:
                if find_idx(root) is None:  # otherwise another run was faster
                    raise
    finally:
        socket.setdefaulttimeout(before)
    return root / "MNIST" / "raw"
