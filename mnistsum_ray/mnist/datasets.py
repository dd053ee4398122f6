"""Where full MNIST is from, and the bundled sample of it."""

import socket
import tempfile
from pathlib import Path
from typing import Final

from mnistsum_ray.data.columns import Images
from mnistsum_ray.data.columns.base import Array, Arrays
from mnistsum_ray.data.parquet import open_parquet
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.mnist import SIDE
from mnistsum_ray.storage.uri import as_request_error, locate
from mnistsum_ray.task import NamedData

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"


def find(data: str) -> NamedData | None:
    """`auto`, `sample`, `mnist`, or MNIST's files in a local folder; None: it is another place.

    RequestError: the data is missing or damaged.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    location = locate(data, "--data")
    folder = _find_mnist(Path(location.path)) if location.is_local else None
    return _mnist(folder) if folder else None


def _sample(notice: str = "") -> NamedData:
    with as_request_error("--data"), open_parquet(locate(str(SAMPLE), "--data")) as parquet:
        table = parquet.read()
    images, _ = Images(SIDE, SIDE).decode(table["image"], "image")
    rows = {"image": images, "digit": table["digit"].to_numpy().astype("int64")}
    return NamedData("sample", "sample", str(SAMPLE), {"train": rows}, notice)


def _full_mnist(*, fall_back: bool) -> NamedData:
    """MNIST from ./data, the cache or a download; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    folder = _find_mnist(Path("data").resolve()) or _find_mnist(cache)
    try:
        return _mnist(folder or _download_mnist(cache))
    except (OSError, RuntimeError) as error:
        missing = f"not in ./data or {cache}, and it cannot be downloaded ({one_line(error)})"
    if not fall_back:
        raise RequestError(f"--data mnist: {missing}; name its folder, or take --data sample")
    return _sample(
        f"NOT the full MNIST: it is {missing}. Going on with the bundled sample of 5,000 images; "
        "--data FOLDER names a copy of the full set."
    )


def _find_mnist(root: Path) -> Path | None:
    """Return the folder with MNIST's files: `root`, or `root`/MNIST/raw as in torchvision."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if (folder / "train-images-idx3-ubyte").exists():
            return folder
    return None


def _mnist(folder: Path) -> NamedData:
    """MNIST in the files of this folder. RequestError: one is missing or damaged."""
    splits: dict[str, Arrays] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", (None, SIDE, SIDE))
        digits = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", (len(images),))
        splits[split] = {"image": images, "digit": digits.astype("int64")}
    return NamedData("mnist", str(folder), str(folder), splits)


def _read_idx(file: Path, shape: tuple[int | None, ...]) -> Array:
    """Return one of MNIST's files, or raise RequestError if it is missing or misshapen."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor  # seconds to import

    try:
        found: Array = read_sn3_pascalvincent_tensor(str(file)).numpy()
        wanted = (shape[0] or len(found), *shape[1:])
        if found.shape != wanted or found.dtype != "uint8":
            raise ValueError(f"has {found.dtype} of shape {found.shape}, and not {wanted}")
    except Exception as error:  # torchvision raises many types on damaged files
        problem = f"is no whole file of MNIST ({one_line(error)}); get it again"
        raise RequestError(f"--data {file}: {problem}") from None
    return found


def _download_mnist(root: Path) -> Path:
    """Download MNIST to `root`/MNIST/raw, which appears when it is whole. OSError, RuntimeError."""
    from torchvision.datasets import MNIST

    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3)  # of each read: without a network torchvision would wait minutes
    try:
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            MNIST(temporary, download=True)
            if _find_mnist(root) is None:  # otherwise another run was faster
                Path(temporary, "MNIST").rename(root / "MNIST")
    finally:
        socket.setdefaulttimeout(before)
    return root / "MNIST" / "raw"
