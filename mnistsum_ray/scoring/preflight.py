"""What can be checked of a scoring request before there is a cluster."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.scoring.footers import Columns, check_columns_exist, read_footers
from mnistsum_ray.scoring.inputs import Inputs, list_inputs
from mnistsum_ray.scoring.parallel import MAX_LOCAL_FILES, map_files
from mnistsum_ray.storage.location import Location, base_folder, locate, locate_existing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScoringRun:
    """A request that has been found sound: what to score with what, and where it goes."""

    config: ScoreConfig
    model: Location
    card: dict[str, Any]
    weights: "dict[str, Tensor]"
    temperatures: Temperatures
    inputs: Inputs
    columns: Columns
    output: Location
    footers: pa.Table | None
    """`footers.FOOTER_SCHEMA`; None where the files are so many that the cluster has to read them."""


def preflight(config: ScoreConfig) -> ScoringRun:
    """Check all that can be checked without a cluster.

    Raises:
        RequestError: the model, the input or the output will not do.
    """
    output = locate(config.output, "--output", base_folder())
    try:
        if output.info().type == pafs.FileType.File:
            raise RequestError(f"--output {output.display}: is a file; name a folder")
        # A link keeps leading to the folder that is replaced; what a URI says beside its path is not repeated.
        output = output.at(os.path.realpath(output.path) if output.is_local else output.path)
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    inputs = list_inputs(config.input, output)
    columns = Columns.of(config)
    footers = None
    if inputs.files.num_rows <= MAX_LOCAL_FILES:
        footers = read_all_footers(inputs, columns)
    model = locate_existing(config.model, "--model")

    from mnistsum_ray.model.serialization import (  # torch, a second to import, for which the rest need not wait
        copy_weights,
        load_model,
    )

    try:
        network, card = load_model(model)
    except RequestError as refusal:
        raise RequestError(f"--model {refusal}") from None
    if config.precision == "int8":
        from mnistsum_ray.model.quantization import is_available, maxima_from_card

        if maxima_from_card(card) is None:
            raise RequestError(
                "--precision int8: the model holds no calibration for it, so it was trained by an older version or where PyTorch "
                "lacks integer convolutions; leave it out, or train anew"
            )
        if not is_available():
            raise RequestError("--precision int8: this PyTorch has no integer convolutions on this CPU; leave it out")
    return ScoringRun(config, model, card, copy_weights(network), network.temperatures, inputs, columns, output, footers)


def read_all_footers(inputs: Inputs, columns: Columns, seen: Callable[[int], None] = lambda _: None) -> pa.Table:
    """`footers.FOOTER_SCHEMA` for each file, in their order.

    Raises:
        RequestError: a column that is needed is in none of the files.
    """

    def look(folder: Location, files: pa.Table) -> pa.Table:
        return read_footers(folder, files, columns)

    footers = map_files(look, inputs.root, inputs.files, seen)
    check_columns_exist(inputs.files["name"], footers, columns)
    return footers
