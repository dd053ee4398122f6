"""What `--data` names: MNIST, the bundled sample, or Parquet files; and the split of each row.

MNIST and the sample are read at once, of Parquet files only the footers. No row is decoded here.
"""

import hashlib
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from mnistsum_ray.config import LabelledDataConfig
from mnistsum_ray.data.images import (
    SIDE,
    Numbers,
    Pixels,
    image_type_error,
    number_type_error,
    one_chunk,
    pixels_array,
    pixels_view,
)
from mnistsum_ray.data.inputs import SUFFIXES, list_inputs
from mnistsum_ray.data.parquet import column_error, read_footer, read_table
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    StorageError,
    UnusableFileError,
    did_you_mean,
    one_line,
)
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import locate, locate_existing

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

SPLITS: Final = ("train", "validation", "test")

MAX_HELD_OUT_ROWS: Final = 5000
"""Most rows, beside a tenth, that are held out for a split which no file is named for."""

_LABEL_COLUMNS: Final = ("digit", "label")

_SPLIT: Final = re.compile(r"(?<![a-z])(train|val|test)(ing|id|idation)?(?![a-z])")
"""A word in the name of a file or folder, in lower case, that names a split."""

_MNIST_FILE: Final = "train-images-idx3-ubyte"

_DOWNLOAD_TIMEOUT_SECONDS: Final = 3
"""Timeout of the connection and of each read; it does not limit the download as a whole."""


class LabelledColumns(NamedTuple):
    """Names and types of two columns. Ray Data reads files together where they are the same."""

    image: str
    label: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class LabelledFile:
    """A Parquet file with images and digits, as its footer describes it."""

    path: Location
    name: str
    """Relative to the folder that was listed."""
    rows: int
    columns: LabelledColumns


@dataclass(frozen=True)
class Source:
    """Where the rows of a run are from, by the split that a file is named for.

    Either the rows are in memory (`tables`), or they are in `files`.
    """

    name: str
    """sample, mnist or parquet."""
    location: str
    fingerprint: str
    """SHA-256 of the content or, for files, of their paths, sizes and ETags."""
    tables: dict[str, pa.Table] = field(default_factory=dict)
    """By split: `image` (784 bytes) and `digit`, with `path` and `row_hash` as of Ray Data."""
    files: dict[str, list[LabelledFile]] = field(default_factory=dict)
    """By split."""
    notice: str = ""
    """Message for the console about the choice of source."""
    skipped: list[str] = field(default_factory=list)
    """As of `Inputs`."""

    def rows_of(self, split: str) -> int:
        """Rows in memory, or in files, that are named for this split."""
        if split in self.tables:
            return int(self.tables[split].num_rows)
        return sum(file.rows for file in self.files.get(split, []))

    @property
    def held_out(self) -> list[str]:
        """Splits that no file is named for: `held_out_rows` of the training rows are theirs."""
        return [split for split in ("test", "validation") if not self.rows_of(split)]

    @property
    def train_rows(self) -> int:
        """Training rows that are left when the other splits have theirs."""
        rows = self.rows_of("train")
        return rows - len(self.held_out) * held_out_rows(rows)


def held_out_rows(train_rows: int) -> int:
    """Number of rows that are held out of so many for one split."""
    return min(MAX_HELD_OUT_ROWS, train_rows // 10)


CountFooters = Callable[[str, int], Callable[[int], None]]
"""Gets the name and number of the things that will be counted; returns what adds to the count."""


def no_progress(what: str, total: int) -> Callable[[int], None]:
    """Shows nothing."""
    return lambda count: None


def open_source(config: LabelledDataConfig, progress: CountFooters = no_progress) -> Source:
    """Find what `--data` names; `progress` counts the footers that have been read.

    Raises:
        RequestError: it is missing, cannot be used, or has no images with digits; names the file.
        RunError: the storage does not give a file.
    """
    data = config.data
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    location = locate_existing(data, "--data")
    hint = did_you_mean(data, ("auto", "mnist", "sample"))
    if hint and not location.exists():
        raise RequestError(f"--data {data}: there is no such file or folder{hint}")
    folder = _find_mnist(Path(location.path)) if location.is_local else None
    if folder is not None:
        return _mnist(folder)
    try:
        return _parquet(config, location, progress)
    except StorageError as error:
        raise RunError(f"--data {error}; nothing was begun") from None


def _sample() -> Source:
    table = read_table(locate(str(SAMPLE), "--data"))
    images = pixels_view(one_chunk(table["image"]))
    return _in_memory("sample", str(SAMPLE), {"train": (images, table["digit"].to_numpy())})


def _full_mnist(*, fall_back: bool) -> Source:
    """MNIST from ./data, the cache or a download; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    folder = _find_mnist(Path("data").resolve()) or _find_mnist(cache)
    try:
        return _mnist(folder or _download_mnist(cache))
    except (OSError, RuntimeError) as error:
        missing = f"not in ./data or {cache}, and it cannot be downloaded ({one_line(error)})"
    if not fall_back:
        raise RequestError(f"--data mnist: {missing}; name its folder, or take --data sample")
    sample = _sample()
    rest = f"Going on with the bundled sample of {sample.rows_of('train'):,} images"
    advice = "--data FOLDER names a copy of the full set"
    return replace(sample, notice=f"NOT the full MNIST: it is {missing}. {rest}; {advice}.")


def _find_mnist(root: Path) -> Path | None:
    """The folder with MNIST's files: `root`/MNIST/raw or `root`/raw, as in torchvision, or it."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if (folder / _MNIST_FILE).exists():
            return folder
    return None


def _mnist(folder: Path) -> Source:
    """MNIST in the files of this folder. RequestError: one is missing or damaged."""
    from torchvision.datasets import MNIST  # takes seconds to import

    class MnistHere(MNIST):
        raw_folder = str(folder)

    rows = {}
    for split, is_train in (("train", True), ("test", False)):
        try:
            found = MnistHere(str(folder), train=is_train)
            _check_shapes(found.data.shape, found.targets.shape)
        except Exception as error:  # of damaged files its reader raises many types
            problem = f"holds no whole MNIST ({one_line(error)}); get its four files again"
            raise RequestError(f"--data {folder}: {problem}") from None
        rows[split] = (found.data.numpy(), found.targets.numpy())
    return _in_memory("mnist", str(folder), rows)


def _check_shapes(images: Sequence[int], digits: Sequence[int]) -> None:
    """ValueError: they are not those of MNIST, which torchvision takes as it finds them."""
    if (*digits, SIDE, SIDE) != tuple(images):
        raise ValueError(f"images of shape {list(images)} and labels of shape {list(digits)}")


def _download_mnist(root: Path) -> Path:
    """Download MNIST to `root`/MNIST/raw, which appears only when it is complete.

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
            if _find_mnist(root) is None:  # otherwise another run was faster
                Path(temporary, "MNIST").rename(root / "MNIST")
    finally:
        socket.setdefaulttimeout(before)
    return root / "MNIST" / "raw"


def _in_memory(name: str, location: str, rows: dict[str, tuple[Pixels, Numbers]]) -> Source:
    """A source of these images and digits, by split. Row ids count over all splits."""
    digest = hashlib.sha256()
    tables = {}
    first = 0
    for split, (images, digits) in rows.items():
        count = len(digits)
        tables[split] = pa.table(
            {
                "image": pixels_array(images),
                "digit": digits,
                "row_hash": np.arange(first, first + count),
                "path": pa.array([f"{name} ({split})"] * count),
            }
        )
        first += count
        digest.update(images.tobytes())
        digest.update(digits.astype(np.int64).tobytes())
    return Source(name, location, digest.hexdigest(), tables)


def _parquet(config: LabelledDataConfig, location: Location, progress: CountFooters) -> Source:
    mnist = f"MNIST's files ({_MNIST_FILE}, …, not gzipped) on a local disk"
    found = list_inputs([config.data], flag="--data", none=f"holds neither {mnist} nor Parquet")
    if found.unusable:
        name, reason = next(iter(found.unusable.items()))
        raise RequestError(f"--data {(found.root / name).display}: {reason}")
    describe = partial(_describe, config, found.root)
    count = progress("footers read", len(found.files))
    listed = in_threads(found.root, describe, list(found.files.items()), count)
    files: dict[str, list[LabelledFile]] = {}
    unnamed = []
    for file in listed:
        split = _split_of_name(file.name)
        if split is None:
            unnamed.append(file)
        else:
            files.setdefault(split, []).append(file)
    if unnamed and files:
        mixed = "some files are named train or test and some are not; rename them"
        raise RequestError(f"--data {location.display}: {mixed} ({unnamed[0].name})")
    # Ids of rows, by which some are held out, follow from the whole path of a file.
    digest = hashlib.sha256(f"{found.root.bucket}/{found.root.path}\n".encode())
    for name, entry in found.files.items():
        digest.update(f"{name}\n{entry.size}\n{entry.e_tag}\n".encode())
    return Source(
        name="parquet",
        location=location.display,
        fingerprint=digest.hexdigest(),
        files=files or {"train": unnamed},
        skipped=found.skipped,
    )


def _describe(
    config: LabelledDataConfig, root: Location, listed: tuple[str, Entry]
) -> LabelledFile:
    """An input file, by its footer."""
    name, entry = listed
    file = root / name
    if not name.partition("?")[0].lower().endswith(SUFFIXES):  # Ray Data would leave it out
        ends = f"its name must end in {', '.join(SUFFIXES)}, and hold no question mark"
        raise RequestError(f"{file.display}: {ends}; rename it")
    try:
        footer = read_footer(file, entry)
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    # Ray Data makes a column of each folder `name=value`.
    folders = dict(re.findall(r"([^/=]+)=([^/]*)/", name))
    names = [*footer.schema.names, *folders]
    image = config.image_column
    wanted = [config.label_column] if config.label_column else list(_LABEL_COLUMNS)
    label = next((one for one in wanted if one in names), None)
    if image not in names or label is None:
        needed = f"a column {image!r} (--image-column) and {' or '.join(map(repr, wanted))}"
        has = ", ".join(names)
        raise RequestError(f"{file.display}: needs {needed} (--label-column), has {has}")
    types = []
    for column, type_error in ((image, image_type_error), (label, number_type_error)):
        if column in folders:
            types.append("folder")
            continue
        wrong = column_error(footer.schema, column, type_error)
        if wrong:
            raise RequestError(f"{file.display}: {wrong}")
        types.append(str(footer.schema.field(column).type))
    columns = LabelledColumns(image, label, tuple(types))
    return LabelledFile(file, name, footer.metadata.num_rows, columns)


def _split_of_name(file: str) -> str | None:
    """The split that the file names or, failing that, its folder; None where neither does."""
    for name in reversed(file.split("/")[-2:]):
        found = _SPLIT.search(name.lower())
        if found:
            return "validation" if found[1] == "val" else found[1]
    return None
