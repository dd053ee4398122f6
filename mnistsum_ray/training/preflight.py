"""Checks of a training request that need no cluster, and the defaults that follow from the data.

Neither torch nor Ray, which take seconds, is imported here: a wrong request is refused at once.
"""

import secrets
import shlex
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from mnistsum_ray.config import SMALL_ROWS, Hyperparameters, TrainConfig, recipe_defaults
from mnistsum_ray.data.inputs import components_below, real_path
from mnistsum_ray.data.sources import Source, StartProgress, no_progress, open_source
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, shell_command
from mnistsum_ray.reporting.results import MANIFEST
from mnistsum_ray.storage.store import Location, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate, locate_existing, output_base_folder

_HYPERPARAMETERS: Final = [field.name for field in fields(Hyperparameters)]

_FIXED_BY_RUN: Final = ("recipe", "skip_bad_rows", "init_from", *_HYPERPARAMETERS)
"""Fields that `--resume` may not change."""


@dataclass(frozen=True)
class TrainingRun:
    """A checked training request: hyperparameters, data and folders."""

    config: TrainConfig
    hyperparameters: Hyperparameters
    source: Source
    folder: Location
    """Run folder `<storage_path>/<name>`."""
    stored: dict[str, Any] | None
    """Manifest of the run that is resumed, whose data must be the same."""

    def ray_storage(self, name: str) -> str:
        """A folder of the run as Ray Train takes it: Arrow decodes percent signs in a URI."""
        folder = self.folder / name
        return folder.path if folder.is_local else folder.at(quote(folder.path)).display

    def how_to_resume(self) -> str:
        """End of an error message: the command that resumes the run."""
        flags = ["--storage-path", self.config.storage_path, "--name", str(self.config.name)]
        command = f"{shell_command('train')} {shlex.join(flags)} --resume"
        return f"checkpoints are kept, and this command resumes: {command}"


def preflight(config: TrainConfig, progress: StartProgress = no_progress) -> TrainingRun:
    """Check the request and fill in its defaults. `progress` is that of `open_source`.

    Raises:
        RequestError: something in the request is wrong; the message says what to do.
    """
    storage = locate(config.storage_path, "--storage-path", output_base_folder())
    name = config.name or f"mnistsum-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = storage / name
    if config.init_from:  # before it is compared with the absolute path of a stored run
        model = locate_existing(config.init_from, "--init-from").display
        config = config.model_copy(update={"init_from": model})
    stored = None
    with as_request_error("--storage-path"):
        # A run that was killed before it wrote its manifest has done nothing: its name is free.
        begun = (folder / MANIFEST).exists()
        if config.resume == "auto":
            config = config.model_copy(update={"resume": begun})
        if config.resume:
            stored, begun_with = _read_run(folder)
            config = _resumed(config, begun_with)
        else:
            _check_free(folder, name, begun)
    source = open_source(config.data, progress)
    _check_outside_data(storage, source)
    recipe = recipe_defaults(config.recipe, small=len(source.train) < SMALL_ROWS)
    chosen = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    # Absolute paths, so that --resume from another folder finds the same data.
    chosen |= {"name": name, "storage_path": storage.display}
    chosen["data"] = "sample" if source.name == "sample" else source.location
    config = config.model_copy(update=chosen)
    hyperparameters = Hyperparameters(**{key: getattr(config, key) for key in _HYPERPARAMETERS})
    return TrainingRun(config, hyperparameters, source, folder, stored)


def _check_free(folder: Location, name: str, begun: bool) -> None:
    """Check that a new run may take this folder."""
    names = [file.path.removeprefix(folder.path).lstrip("/") for file in folder.files()]
    if folder.status() is not None or not all(map(is_hidden, names)):
        there = "exists; go on with --resume, or" if begun else "holds other files, and no run;"
        raise RequestError(f"--name {name}: {folder.display} {there} choose another name")


def _check_outside_data(storage: Location, source: Source) -> None:
    """Check that no later run takes files of runs for data."""
    data = locate(source.location, "--data")
    if source.name != "parquet" or storage.bucket != data.bucket:
        return
    if components_below(real_path(storage), real_path(data)) is not None:
        raise RequestError(
            f"--storage-path {storage.display}: lies in --data {data.display}, whose next run "
            "would take the files of this one for data; put it elsewhere"
        )


def _resumed(config: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """The config of the run that is resumed, with the fields that are given now.

    RequestError: a field would change its numbers.
    """
    # A null, as a YAML file may have it, leaves the choice to the stored run.
    asked = {key: getattr(config, key) for key in config.model_fields_set}
    given = {key: value for key, value in asked.items() if value is not None}
    for key in _FIXED_BY_RUN:
        has = getattr(stored, key)
        if key in given and given[key] != has:
            flag = f"--{key.replace('_', '-')} {given[key]}"
            raise RequestError(
                f"{flag}: the run {config.name} has {'none' if has is None else has}, and its "
                "numbers depend on it; leave the flag out, or start another run"
            )
    return stored.model_copy(update=given)


def _read_run(folder: Location) -> tuple[dict[str, Any], TrainConfig]:
    """The manifest of a run, and its config.

    RequestError: there is none, or it is damaged, or another version wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = path.read_json()
        config = TrainConfig(**manifest["config"])
        if not {"sha256", "location", "notice"} <= set(manifest["data"]):
            raise KeyError("data")
    except MissingFileError:
        problem = f"there is no run in {folder.display} (no {MANIFEST}); start it without --resume"
        raise RequestError(f"--resume: {problem}") from None
    except StorageError as error:
        raise RequestError(f"--resume: {error}") from None
    except (ValueError, KeyError, TypeError):
        problem = "is damaged, or of another version; start another run"
        raise RequestError(f"--resume: {path.display} {problem}") from None
    return manifest, config
