"""Checks of a training request that need no cluster, and the defaults that follow from the data: its recipe.

This module imports neither torch nor Ray, which take seconds, so that a wrong request is refused at once.
"""

import secrets
import shlex
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Final

from pydantic import ValidationError

from mnistsum_ray.config import SMALL_ROWS, Hyperparameters, TrainConfig, recipe_defaults
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.data.sources import Counter, Source, open_source
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, one_line, shell_command
from mnistsum_ray.storage.location import Location, is_partial
from mnistsum_ray.storage.lock import LOCK_NAME
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder, refused

DATA_FILES: Final = "data_files.parquet"
"""The files of a run, written before its manifest: a file that has changed can be named when the run is resumed or repeated."""

_FIXED: Final = ("recipe", "from_run", "skip_bad_rows", *(field.name for field in fields(Hyperparameters)))
"""Fields that `--resume` may not change."""

_WORKERS: Final = ("num_workers", "use_gpu")
"""Fields that change the last bits of the weights: sums of more workers are added in another order."""


@dataclass(frozen=True)
class TrainingRun:
    """A checked training request: hyperparameters, data and folders."""

    config: TrainConfig
    hyperparameters: Hyperparameters
    source: Source
    storage: Location
    folder: Location
    """Run folder `<storage_path>/<name>`."""
    same_data: tuple[Location, dict[str, Any]] | None
    """Folder and manifest of the run whose data this one must have; None: any data may be used."""

    @cached_property
    def shuffle(self) -> Shuffle:
        """Order of the training rows. Those of Parquet files with more rows than are shuffled together are streamed."""
        source, parameters = self.source, self.hyperparameters
        streamed = source.files is not None and source.rows > parameters.shuffle_rows
        bounds = source.files.group_bounds if source.files and streamed else None
        return Shuffle(source.train, bounds, parameters.batch_size, parameters.shuffle_rows, parameters.seed)

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
    folder, same_data = storage / name, None
    with refused("--storage-path"):
        # A run that was killed before it wrote its manifest has done nothing yet, so its name is free.
        begun = (folder / "manifest.json").exists()
        ours = (LOCK_NAME, DATA_FILES)
        taken = any(not is_partial(entry.name) and entry.name not in ours for entry in folder.entries())
        if config.resume == "auto":
            config = config.model_copy(update={"resume": begun})
        if config.resume:
            config, same_data = _inherit(config, folder, "--resume")
        elif taken:
            there = "exists; go on with --resume, or" if begun else "holds other files, and no run;"
            raise RequestError(f"--name {name}: {folder.display} {there} choose another name")
    if config.from_run and not config.resume:  # a resumed run has taken what it needs from that one
        config, same_data = _inherit(config, locate_existing(config.from_run, "--from-run"), "--from-run")
    if config.mlflow:
        config = config.model_copy(update={"mlflow": _mlflow(config.mlflow)})
    source = open_source(config.data, counter, skip_bad_rows=config.skip_bad_rows)
    recipe = recipe_defaults(config.recipe, small=len(source.train) < SMALL_ROWS)
    unset = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    # Absolute paths, so that --resume from another folder finds the same data.
    resolved = {"name": name, "storage_path": storage.display, "data": "sample" if source.name == "sample" else source.location}
    config = config.model_copy(update=unset | resolved)
    hyperparameters = Hyperparameters(**{field.name: getattr(config, field.name) for field in fields(Hyperparameters)})
    return TrainingRun(config, hyperparameters, source, storage.with_retries(), folder.with_retries(), same_data)


def _mlflow(uri: str) -> str:
    """The URI with an absolute path, if what logs to it is installed."""
    missing = [name for name in ("mlflow", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RequestError(f"--mlflow needs packages that are not installed ({', '.join(missing)}): pip install -e '.[mlflow]'")
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{output_base_folder() / path}"


def _inherit(config: TrainConfig, folder: Location, flag: str) -> tuple[TrainConfig, tuple[Location, dict[str, Any]] | None]:
    """The config, where a field is not given, with that of the run in a folder; and `TrainingRun.same_data`.

    `--resume` takes all fields, `--from-run` those that the numbers depend on.

    Raises:
        RequestError: there is no such run, another version wrote it, or with `--resume` a field would change its numbers.
    """
    manifest = read_manifest(folder, flag)
    try:
        stored = TrainConfig(**manifest["config"])
        same_version = {*_FIXED} <= {"skip_bad_rows", *manifest["config"]}  # earlier versions did what is now its default
    except (KeyError, TypeError, ValidationError):
        same_version = False
    if not same_version:
        raise RequestError(f"{flag}: {(folder / 'manifest.json').display} was written by another version of this program")
    if stored.precision is None:
        stored = stored.model_copy(update={"precision": _chosen_precision(folder, manifest)})
    given = {key: getattr(config, key) for key in config.model_fields_set}
    # A null, as in the YAML of `--print-config`, leaves the choice to the recipe or the stored run.
    given = {key: value for key, value in given.items() if key not in (*_FIXED, *_WORKERS) or value is not None}
    if config.resume:
        for key in _FIXED:
            has = getattr(stored, key)
            if key in given and given[key] != has:
                raise RequestError(
                    f"--{key.replace('_', '-')} {given[key]}: the run {config.name} has {'none' if has is None else has}, and "
                    "its numbers depend on it; leave the flag out, or start another run"
                )
        return stored.model_copy(update=given), (folder, manifest)
    # Another recipe sets what it sets.
    ruled = recipe_defaults(given["recipe"], small=False) if given.get("recipe", stored.recipe) != stored.recipe else {}
    same = {key: getattr(stored, key) for key in (*_FIXED, *_WORKERS, "data") if key not in given and key not in ruled}
    same |= {key: manifest.get(key) for key in _WORKERS if key in same and same[key] is None}  # as the run has chosen
    if isinstance(same.get("num_workers"), list):
        same["num_workers"] = tuple(same["num_workers"])
    return config.model_copy(update=same), (folder, manifest) if "data" in same else None


def _chosen_precision(folder: Location, manifest: dict[str, Any]) -> str | None:
    """The precision that the workers of a run have chosen: of its manifest if it is finished, else of any checkpoint."""
    if "precision" in manifest:
        return str(manifest["precision"])
    for info in folder.files():
        if info.name == "trainer.json":
            with suppress(OSError, ValueError, KeyError, TypeError):  # a torn one
                return str(folder.at(info.path).read_json()["precision"])
    return None


def read_manifest(folder: Location, flag: str) -> dict[str, Any]:
    """Read the manifest of the run in a folder; `flag` names the request in errors.

    Raises:
        RequestError: it is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = path.read_json()
        known = {"sha256", "location", "notice"} <= set(manifest["data"])
    except MissingFileError:
        raise RequestError(f"{flag}: there is no run in {folder.display} (no manifest.json); start it without {flag}") from None
    except StorageError as error:
        raise RequestError(f"{flag}: {error}") from None
    except ValueError as error:
        raise RequestError(f"{flag}: {path.display} is not JSON ({one_line(error)}); start another run") from None
    except (KeyError, TypeError):
        known = False
    if not known:
        raise RequestError(f"{flag}: {path.display} does not say which data the run had; start another run")
    return manifest
