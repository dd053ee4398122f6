"""What can be checked of a training request before there is a cluster. No torch and no Ray: a refusal is not to wait for them."""

import secrets
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

from pyarrow.fs import FileSelector, FileType
from pydantic import ValidationError

from mnistsum_ray.config import Settings, TrainConfig
from mnistsum_ray.connect import answers
from mnistsum_ray.errors import Refusal, one_line
from mnistsum_ray.lock import LOCK, refuse_held
from mnistsum_ray.mnist import Source, open_source
from mnistsum_ray.storage import Location, base_folder, is_partial, locate

SMALL_ROWS: Final = 20_000
"""Below so many training rows, smaller batches and more epochs: the sum head needs its number of steps."""

_FIXED: Final = ("recipe", *(field.name for field in fields(Settings)))
"""What `--resume` may not change."""


@dataclass(frozen=True)
class Run:
    """A request that has been found sound: what to train on what, and where it goes."""

    config: TrainConfig
    settings: Settings
    source: Source
    storage: Location
    folder: Location
    """The run's own, below the storage path."""


def prepare(config: TrainConfig) -> Run:
    """Check all that can be checked without a cluster, and fill in what follows from the data.

    Raises:
        Refusal: the data, the name or the storage will not do.
    """
    storage = locate(config.storage_path, "--storage-path", base_folder())
    name = config.name or f"mnistsum-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = storage / name
    try:
        # A run that was killed before it wrote its manifest has done nothing yet, and keeps nobody from the name.
        taken = (folder / "manifest.json").exists() or (folder.exists() and not _is_empty(folder))
        if config.resume:
            config = _resumed(config, folder)
            refuse_held(folder, "--name")
        elif taken:
            refuse_held(folder, "--name")
            raise Refusal(f"--name {name}: {folder.text} exists; continue it with --resume, or choose another name")
    except OSError as error:
        raise Refusal(f"--storage-path {storage.text}: {one_line(error)}") from None
    if config.mlflow:
        config = config.model_copy(update={"mlflow": _mlflow(config.mlflow, resume=config.resume)})
    source = open_source(config.data)
    recipe = _recipe(config.recipe, small=len(source.train) < SMALL_ROWS)
    unset = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    # As found, so that --resume finds the same from any folder and on any day.
    found = {"name": name, "storage_path": storage.text, "data": "sample" if source.name == "sample" else source.location}
    config = config.model_copy(update=unset | found)
    settings = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
    return Run(config, settings, source, storage.patient(), folder.patient())


def _mlflow(uri: str, *, resume: bool) -> str:
    """The URI as it is found from any folder. A run that goes on does so without a server that is gone."""
    if find_spec("mlflow") is None:
        raise Refusal("--mlflow: MLflow is not installed here; pip install -e '.[mlflow]'")
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{base_folder() / uri.removeprefix('sqlite:///')}"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise Refusal(f"--mlflow {uri}: {error}") from None
    if not resume and not answers(host, port):
        raise Refusal(f"--mlflow {uri}: no server answers there")
    return uri


def _recipe(name: str, *, small: bool) -> dict[str, Any]:
    """What is meant where nothing is said."""
    if name == "long":
        size = {"epochs": 40, "batch_size": 64} if small else {"epochs": 30, "batch_size": 128}
        augmentation = {"max_shift": 0, "distortion": 1.0, "label_smoothing": 0.05, "dropout": 0.25}
    else:
        size = {"epochs": 6, "batch_size": 64} if small else {"epochs": 5, "batch_size": 256}
        augmentation = {"max_shift": 1 if small else 2, "distortion": 0.0, "label_smoothing": 0.0, "dropout": 0.0}
    return size | augmentation | {"sum_head_steps": 4_000 if small else 20_000}


def _resumed(config: TrainConfig, folder: Location) -> TrainConfig:
    """The config of the stored run, with what this command says of the cluster."""
    manifest = read_manifest(folder)
    try:
        stored = TrainConfig(**manifest["config"])
        if set(_FIXED) - set(manifest["config"]):
            raise KeyError
    except (KeyError, TypeError, ValidationError):
        raise Refusal(f"--resume: {(folder / 'manifest.json').text} is not that of a run of this version") from None
    given = {key: getattr(config, key) for key in config.model_fields_set}
    for key in _FIXED:
        if key in given and given[key] != getattr(stored, key):
            raise Refusal(
                f"--{key.replace('_', '-')} {given[key]}: the run {config.name} has {getattr(stored, key)}, and its numbers "
                "depend on it; leave the flag out, or start another run"
            )
    return stored.model_copy(update=given)


def _is_empty(folder: Location) -> bool:
    """Whether nothing but unfinished files of ours lies there, or a lock that a killed run has left."""
    entries = folder.filesystem.get_file_info(FileSelector(folder.path)) if folder.info().type == FileType.Directory else None
    return entries is not None and all(is_partial(entry.base_name) or entry.base_name == LOCK for entry in entries)


def read_manifest(folder: Location) -> dict[str, Any]:
    """The manifest of the run in a folder.

    Raises:
        Refusal: there is none.
    """
    try:
        manifest: dict[str, Any] = (folder / "manifest.json").read_json()
    except FileNotFoundError:
        raise Refusal(f"--resume: there is no run in {folder.text} (no manifest.json); start it without --resume") from None
    except ValueError as error:
        raise Refusal(f"--resume: {(folder / 'manifest.json').text} is not JSON ({one_line(error)}); start another run") from None
    data = manifest.get("data") if isinstance(manifest, dict) else None
    if not isinstance(data, dict) or not {"sha256", "location", "notice"} <= set(data):
        raise Refusal(
            f"--resume: {(folder / 'manifest.json').text} does not say which data the run had, so nobody can tell whether they "
            "are still the same; start another run"
        )
    return manifest
