"""Checks of a training request that need no cluster, and the defaults that follow from the data: its recipe.

This module imports neither torch nor Ray, which take seconds, so that a wrong request is refused at once.
"""

import secrets
import shlex
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import quote

from pydantic import ValidationError

from mnistsum_ray.config import SMALL_ROWS, Hyperparameters, TrainConfig, recipe_defaults
from mnistsum_ray.data.blocks import FileGroup
from mnistsum_ray.data.inputs import parts_below, real_path
from mnistsum_ray.data.sources import Counter, Source, open_source
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, shell_command
from mnistsum_ray.storage.store import Location, is_hidden
from mnistsum_ray.storage.uri import locate, locate_existing, output_base_folder, refused

MANIFEST: Final = "manifest.json"

_FIXED: Final = ("recipe", "skip_bad_rows", "init_from", *(field.name for field in fields(Hyperparameters)))
"""Fields that `--resume` may not change."""


@dataclass(frozen=True)
class TrainingRun:
    """A checked training request: hyperparameters, data and folders."""

    config: TrainConfig
    hyperparameters: Hyperparameters
    source: Source
    storage: Location
    folder: Location
    """Run folder `<storage_path>/<name>`."""
    stored: dict[str, Any] | None
    """Manifest of the run that is resumed, whose data must be the same."""

    @property
    def init_from(self) -> Location | None:
        """Run or model whose weights a new run begins with."""
        return locate(self.config.init_from, "--init-from") if self.config.init_from else None

    def input_file(self) -> dict[str, Location]:
        """The first file of the data by its flag, where tasks read it."""
        group = self.source.groups[0]
        return {"--data": group.root / group.files[0].name} if isinstance(group, FileGroup) else {}

    def ray_storage(self, name: str) -> str:
        """A folder of the run as Ray Train takes it: Arrow decodes percent signs in a URI."""
        folder = self.folder / name
        return folder.path if folder.is_local else folder.at(quote(folder.path)).display

    def how_to_resume(self) -> str:
        """End of an error message: the command that resumes the run."""
        flags = ["--storage-path", self.storage.display, "--name", str(self.config.name), "--resume"]
        return f"checkpoints are kept, and this command resumes: {shell_command('train')} {shlex.join(flags)}"


def preflight(config: TrainConfig, counter: Counter = lambda *_: lambda _: None) -> TrainingRun:
    """Check the request and fill in its defaults. `counter` is that of `open_source`.

    Raises:
        RequestError: the data, the name or the storage cannot be used.
    """
    storage = locate(config.storage_path, "--storage-path", output_base_folder())
    name = config.name or f"mnistsum-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = storage / name
    if config.init_from:  # before it is compared with the absolute path of a stored run
        config = config.model_copy(update={"init_from": locate_existing(config.init_from, "--init-from").display})
    stored = None
    with refused("--storage-path"):
        # A run that was killed before it wrote its manifest has done nothing yet, so its name is free.
        begun = (folder / MANIFEST).exists()
        names = (file.path.removeprefix(folder.path).lstrip("/") for file in folder.files())
        taken = folder.status() is not None or any(not is_hidden(file) for file in names)
        if config.resume == "auto":
            config = config.model_copy(update={"resume": begun})
        if config.resume:
            stored = read_manifest(folder)
            config = _resumed(config, folder, stored)
        elif taken:
            there = "exists; go on with --resume, or" if begun else "holds other files, and no run;"
            raise RequestError(f"--name {name}: {folder.display} {there} choose another name")
    if config.mlflow:
        config = config.model_copy(update={"mlflow": _mlflow(config.mlflow)})
    source = open_source(config.data, counter)
    _check_apart(storage, source)
    recipe = recipe_defaults(config.recipe, small=len(source.train) < SMALL_ROWS)
    unset = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    # Absolute paths, so that --resume from another folder finds the same data.
    resolved = {"name": name, "storage_path": storage.display, "data": "sample" if source.name == "sample" else source.location}
    config = config.model_copy(update=unset | resolved)
    hyperparameters = Hyperparameters(**{field.name: getattr(config, field.name) for field in fields(Hyperparameters)})
    return TrainingRun(config, hyperparameters, source, storage, folder, stored)


def _check_apart(storage: Location, source: Source) -> None:
    """Check that no later run takes files of runs for data."""
    data = locate(source.location, "--data")
    same_place = (storage.bucket, storage.is_local) == (data.bucket, data.is_local)
    if source.name == "parquet" and same_place and parts_below(real_path(storage), real_path(data)) is not None:
        problem = f"lies in --data {data.display}, whose next run would take the files of this one for data"
        raise RequestError(f"--storage-path {storage.display}: {problem}; put it elsewhere")


def _mlflow(uri: str) -> str:
    """The URI with an absolute path, if what logs to it is installed."""
    missing = [name for name in ("mlflow", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RequestError(f"--mlflow needs packages that are not installed ({', '.join(missing)}): pip install -e '.[mlflow]'")
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{output_base_folder() / path}"


def _resumed(config: TrainConfig, folder: Location, manifest: dict[str, Any]) -> TrainConfig:
    """The config of the run in a folder, with the fields that are given now.

    Raises:
        RequestError: another version wrote it, or a field would change its numbers.
    """
    try:
        stored = TrainConfig(**manifest["config"])
    except (KeyError, TypeError, ValidationError):
        raise RequestError(f"--resume: {folder.display} was written by another version of this program") from None
    # A null, as a YAML file may have it, leaves the choice to the stored run.
    given = {key: value for key, value in config if key in config.model_fields_set and value is not None}
    for key in _FIXED:
        has = getattr(stored, key)
        if key in given and given[key] != has:
            raise RequestError(
                f"--{key.replace('_', '-')} {given[key]}: the run {config.name} has {'none' if has is None else has}, and "
                "its numbers depend on it; leave the flag out, or start another run"
            )
    return stored.model_copy(update=given)


def read_manifest(folder: Location) -> dict[str, Any]:
    """Read the manifest of the run in a folder, which is resumed.

    Raises:
        RequestError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = path.read_json()
        known = {"sha256", "location", "notice"} <= set(manifest["data"])
    except MissingFileError:
        raise RequestError(f"--resume: there is no run in {folder.display} (no {MANIFEST}); start it without --resume") from None
    except StorageError as error:
        raise RequestError(f"--resume: {error}") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise RequestError(f"--resume: {path.display} is damaged, or of another version; start another run")
    return manifest
