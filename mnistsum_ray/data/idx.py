"""The files that MNIST comes as: IDX, in torchvision's layout or alone in a folder, and downloaded where there are none."""

import gzip
import socket
import struct
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.decoding import SIDE, Pixels
from mnistsum_ray.errors import RequestError

FILES: Final = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_DOWNLOAD_SECONDS: Final = 3


def find(root: Path) -> Path | None:
    """The folder at or below `root` that holds IDX files, in any of the layouts that torchvision and people use."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if any((folder / (name + suffix)).exists() for name in FILES for suffix in ("", ".gz")):
            return folder
    return None


def read(folder: Path) -> tuple[Pixels, npt.NDArray[np.uint8], int]:
    """All images uint8[n, 28, 28], their labels uint8[n], and how many of them, the last, are for tests.

    Raises:
        RequestError: a file is missing, is not IDX, or does not go with the others; names the file.
    """
    train_images, train_digits, test_images, test_digits = (_read_file(folder, name) for name in FILES)
    for name, images, digits in (
        (FILES[0], train_images, train_digits),
        (FILES[2], test_images, test_digits),
    ):
        if images.shape[1:] != (SIDE, SIDE):
            raise RequestError(f"{folder / name}: images are {images.shape[1]} x {images.shape[2]} pixels, not 28 x 28")
        if len(images) != len(digits):
            raise RequestError(f"{folder / name}: has {len(images):,} images, but its label file has {len(digits):,} labels")
    return np.concatenate([train_images, test_images]), np.concatenate([train_digits, test_digits]), len(test_images)


def _read_file(folder: Path, name: str) -> Pixels:
    """Read one IDX file of unsigned bytes (the format is described on the MNIST page), gzip-compressed or not."""
    path = folder / name
    if not path.exists():
        path = folder / (name + ".gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{folder}: {name} is missing, gzipped or not") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    dimensions = 3 if "idx3" in name else 1
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise RequestError(f"{path}: is not an IDX file of unsigned bytes with {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise RequestError(f"{path}: holds {len(data) - header:,} bytes of data where its header says {expected:,}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def download(root: Path) -> None:
    """Download through torchvision, which checks the checksums; a machine without a network finds out in seconds.

    It appears under `root` when it is whole, so that a download that was cut off is made again.

    Raises:
        OSError, RuntimeError: no mirror answers or has it, or it cannot be written.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and most runs do not download

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        errors = []
        for mirror in MNIST.mirrors:
            try:
                urllib.request.urlopen(urllib.request.Request(mirror, method="HEAD"), timeout=_DOWNLOAD_SECONDS).close()
            except urllib.error.HTTPError:
                pass  # it answers; whether it has the files torchvision will see
            except OSError as error:
                errors.append(str(getattr(error, "reason", error)))
        if len(errors) == len(MNIST.mirrors):
            raise RuntimeError(f"no mirror answers: {errors[0]}")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as partial:
            MNIST(partial, download=True)
            try:
                (Path(partial) / "MNIST").replace(root / "MNIST")
            except OSError:
                if find(root) is None:  # otherwise another run was faster
                    raise
    finally:
        socket.setdefaulttimeout(before)
