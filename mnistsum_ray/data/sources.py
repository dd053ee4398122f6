"""What `--data` names: MNIST, the bundled sample, or Parquet files; and the split of each row.

MNIST and the sample are read at once, of Parquet files only the footers. Rows of files are read
later, by Ray Data.
"""

import hashlib
import re
import socket
import tempfile
from collections.abc import Callable
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
    decode_images,
    image_type_error,
    number_type_error,
)
from mnistsum_ray.data.inputs import SUFFIXES, list_inputs
from mnistsum_ray.data.parquet import column_error, open_parquet, read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError, did_you_mean, one_line
from mnistsum_ray.storage.bucket import check_ray_reaches
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

SPLITS: Final = ("train", "validation", "test")

_SPLIT_WORD: Final = re.compile(r"(?<![a-z])(train|val|test)(ing|id|idation)?(?![a-z])")
"""A word in the name of a file or folder, in lower case, that names a split."""

_MNIST_FILE: Final = "train-images-idx3-ubyte"


class LabelledFile(NamedTuple):
    """A Parquet file with images and digits, as its footer describes it."""

    path: Location
    name: str  # relative to the folder that was listed
    e_tag: str  # when its footer was read
    rows: int
    image: str  # name of the column of images
    label: str  # name of the column of labels
    schema: pa.Schema  # of both columns; Ray Data reads files together where these agree
    label_is_folder: bool  # a folder `label=3` says the label, and no column


@dataclass(frozen=True)
class Source:
    """Where the rows of a run are from, by the split that a file is named for.

    Either the rows are in memory (`tables`), or they are in `files`.
    """

    name: str  # sample, mnist or parquet
    location: str
    fingerprint: str  # SHA-256 of the content or, for files, of their paths, sizes and ETags
    # By split: `image` uint8[28, 28] and `digit`, with `path` and `row_hash` as of Ray Data.
    tables: dict[str, pa.Table] = field(default_factory=dict)
    files: dict[str, list[LabelledFile]] = field(default_factory=dict)  # by split
    notice: str = ""  # message for the console about the choice of source
    skipped: list[str] = field(default_factory=list)  # as of `Inputs`
    max_rows: int | None = None  # most rows of each split; None: all

    def limited(self, max_rows: int | None) -> "Source":
        """The same with so many rows a split at most, and no more files than these need."""
        if max_rows is None:
            return self
        files: dict[str, list[LabelledFile]] = {}
        for split, of_split in self.files.items():
            rows = 0
            for file in of_split:
                if rows < 1.25 * max_rows:  # a fifth may be held out
                    files.setdefault(split, []).append(file)
                rows += file.rows
        return replace(self, files=files, max_rows=max_rows)

    def rows_of(self, split: str) -> int:
        """Rows in memory, or in files, that are named for this split."""
        if split in self.tables:
            return int(self.tables[split].num_rows)
        return sum(file.rows for file in self.files.get(split, []))

    @property
    def held_out_splits(self) -> list[str]:
        """Splits that no file is named for: `held_out_rows` of the training rows are theirs."""
        return [split for split in ("test", "validation") if not self.rows_of(split)]

    @property
    def train_rows(self) -> int:
        """Training rows that are left when the other splits have theirs."""
        rows = self.rows_of("train")
        rows -= len(self.held_out_splits) * held_out_rows(rows)
        return min(rows, self.max_rows or rows)


def held_out_rows(train_rows: int) -> int:
    """Number of rows that are held out of so many for one split: a tenth, and 5,000 at most."""
    return min(5000, train_rows // 10)


StartProgress = Callable[[str, int], Callable[[int], None]]
"""From what is counted, and its total, to the function that adds to the count."""


def open_source(config: LabelledDataConfig, start_progress: StartProgress | None = None) -> Source:
    """Find what `--data` names; `start_progress` shows how many footers have been read.

    RequestError: the data is missing or unusable. TryAgainError: the storage does not answer.
    """
    if config.data == "sample":
        return _sample()
    if config.data in ("auto", "mnist"):
        return _full_mnist(fall_back=config.data == "auto")
    with as_request_error("--data"):
        check_ray_reaches(locate(config.data, "--data"))
    location = locate_existing(config.data, "--data")
    hint = did_you_mean(config.data, ("auto", "mnist", "sample"))
    if hint and not location.exists():
        raise RequestError(f"--data {config.data}: there is no such file or folder{hint}")
    folder = _find_mnist(Path(location.path)) if location.is_local else None
    if folder is not None:
        return _mnist(folder)
    with as_request_error("--data"):
        return _parquet(config, location, start_progress)


def _sample() -> Source:
    with open_parquet(locate(str(SAMPLE), "--data")) as parquet:
        table = parquet.read()
    images, _ = decode_images(table["image"])
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
    notice = f"NOT the full MNIST: it is {missing}. "
    notice += f"Going on with the bundled sample of {sample.rows_of('train'):,} images; "
    return replace(sample, notice=notice + "--data FOLDER names a copy of the full set.")


def _find_mnist(root: Path) -> Path | None:
    """The folder with MNIST's files: `root`/MNIST/raw or /raw, as in torchvision, or `root`."""
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
            images, digits = found.data.numpy(), found.targets.numpy()
            if images.shape != (*digits.shape, SIDE, SIDE):  # torchvision takes what it finds
                raise ValueError(f"images and labels have shapes {images.shape}, {digits.shape}")
        except Exception as error:  # torchvision raises many types on damaged files
            problem = f"holds no whole MNIST ({one_line(error)}); get its four files again"
            raise RequestError(f"--data {folder}: {problem}") from None
        rows[split] = (images, digits)
    return _in_memory("mnist", str(folder), rows)


def _download_mnist(root: Path) -> Path:
    """Download MNIST to `root`/MNIST/raw, which appears only when it is complete.

    OSError, RuntimeError: no mirror has some file, or they cannot be written.
    """
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


def _in_memory(name: str, location: str, rows: dict[str, tuple[Pixels, Numbers]]) -> Source:
    """A source of these images and digits, by split. Row ids count over all splits."""
    digest = hashlib.sha256()
    tables = {}
    first = 0
    for split, (images, digits) in rows.items():
        last = first + len(digits)
        columns = {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "digit": digits,
            "row_hash": np.arange(first, last),
            "path": [f"{name} ({split})"] * len(digits),
        }
        tables[split] = pa.table(columns)
        first = last
        digest.update(images.tobytes())
        digest.update(digits.astype(np.int64).tobytes())
    return Source(name, location, digest.hexdigest(), tables)


def _parquet(
    config: LabelledDataConfig, location: Location, start_progress: StartProgress | None
) -> Source:
    mnist = f"MNIST's files ({_MNIST_FILE}, …, not gzipped) on a local disk"
    found = list_inputs([config.data], flag="--data", if_none=f"holds neither {mnist} nor Parquet")
    describe = partial(_describe, config, found.root)
    count = start_progress("footers read", len(found.files)) if start_progress else None
    files: dict[str, list[LabelledFile]] = {}
    for file in in_threads(found.root, describe, list(found.files.items()), count):
        files.setdefault(_split_of_name(file.name), []).append(file)
    unnamed = files.pop("", [])
    if unnamed and files:
        mixed = "some files are named train or test and some are not; rename them"
        raise RequestError(f"--data {location.display}: {mixed} ({unnamed[0].name})")
    # Row ids, which decide what is held out, follow from the whole path of a file.
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


def check_unchanged(config: LabelledDataConfig, source: Source) -> None:
    """RequestError: a file is not the one whose footer was read: its rows may be of both."""
    if not source.files:
        return
    now = list_inputs([config.data], flag="--data").files
    for files in source.files.values():
        for file in files:
            if file.name not in now or now[file.name].e_tag != file.e_tag:
                changed = "has changed while it was read; run the command again"
                raise RequestError(f"--data {file.path.display}: {changed}")


def _describe(
    config: LabelledDataConfig, root: Location, listed: tuple[str, Entry]
) -> LabelledFile:
    """What the footer of an input file says. RequestError: the file cannot be used."""
    name, entry = listed
    file = root / name
    # Ray Data looks for the suffix before a question mark, and would leave other files out.
    if not name.partition("?")[0].lower().endswith(SUFFIXES):
        ends = f"its name must end in {', '.join(SUFFIXES)}, and hold no question mark"
        raise RequestError(f"{file.display}: {ends}; rename it")
    try:
        footer = read_footer(file, entry)
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    schema = footer.schema_arrow
    of_folders = {*re.findall(r"([^/=]+)=[^/]*/", name)} - {*schema.names}
    for folder in of_folders:  # Ray Data makes a column of each folder `name=value`
        schema = schema.append(pa.field(folder, pa.string()))
    names = [config.label_column] if config.label_column else ["digit", "label"]
    label = next((one for one in names if one in schema.names), names[0])
    for flag, column, type_error in (
        ("--image-column", config.image_column, image_type_error),
        ("--label-column", label, number_type_error),
    ):
        problem = column_error(schema, column, flag, type_error)
        if column in ("path", "row_hash"):
            problem = f"column {column!r} has the name of one that Ray Data adds; rename it"
        if problem:
            raise RequestError(f"{file.display}: {problem}")
    image, rows = config.image_column, footer.metadata.num_rows
    of_both = pa.schema([schema.field(image), schema.field(label)])
    is_folder = label in of_folders
    return LabelledFile(file, name, entry.e_tag, rows, image, label, of_both, is_folder)


def _split_of_name(file: str) -> str:
    """The split that the file names or, failing that, its folder; empty where neither does."""
    for name in reversed(file.split("/")[-2:]):
        found = _SPLIT_WORD.search(name.lower())
        if found:
            return "validation" if found[1] == "val" else found[1]
    return ""
