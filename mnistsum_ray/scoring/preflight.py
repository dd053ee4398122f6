"""Checks of a scoring request that need no cluster: the output, the input files, the columns and the model."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.scoring.footers import read_all_footers
from mnistsum_ray.scoring.input_columns import Columns
from mnistsum_ray.scoring.inputs import Inputs, list_inputs
from mnistsum_ray.scoring.parallel import MAX_LOCAL_FILES
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate, locate_existing, output_base_folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScoringRun:
    """A checked request: the model, the input files, and the output folder."""

    config: ScoreConfig
    model: Location
    card: dict[str, Any]
    """Contents of the model's `model.json`."""
    weights: "dict[str, Tensor]"
    temperatures: Temperatures
    inputs: Inputs
    columns: Columns
    output: Location
    footers: pa.Table | None
    """`footers.FOOTER_SCHEMA`; None if there are so many files that the cluster has to read their footers."""

    def with_retries(self) -> "ScoringRun":
        """The same run, which retries for a while when the storage does not answer."""
        inputs = replace(self.inputs, root=self.inputs.root.with_retries())
        return replace(self, inputs=inputs, output=self.output.with_retries())


def preflight(config: ScoreConfig) -> ScoringRun:
    """Check everything that can be checked without a cluster.

    Raises:
        RequestError: the model, the input or the output cannot be used.
    """
    output = _locate_output(config.output)
    inputs = list_inputs(config.input, output)
    columns = Columns.from_config(config)
    footers = read_all_footers(inputs, columns) if inputs.files.num_rows <= MAX_LOCAL_FILES else None
    model = locate_existing(config.model, "--model")

    # Importing torch takes a second, and a request whose files are wrong is refused without it.
    from mnistsum_ray.model.serialization import copy_weights, load_model

    try:
        network, card = load_model(model)
    except RequestError as error:
        raise RequestError(f"--model {error}") from None
    if config.precision == "int8":
        _check_int8(card)
    return ScoringRun(config, model, card, copy_weights(network), network.temperatures, inputs, columns, output, footers)


def _locate_output(text: str) -> Location:
    output = locate(text, "--output", output_base_folder())
    try:
        if output.info().type == pafs.FileType.File:
            raise RequestError(f"--output {output.display}: is a file; name a folder")
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    # With its link resolved, the folder can be replaced and the link still leads to it. `at` also removes the query of a URI
    # from the display.
    return output.at(os.path.realpath(output.path) if output.is_local else output.path)


def _check_int8(card: dict[str, Any]) -> None:
    from mnistsum_ray.model.quantization import is_available, maxima_from_card

    if maxima_from_card(card) is None:
        raise RequestError(
            "--precision int8: the model holds no calibration for it, so it was trained by an older version or where PyTorch "
            "lacks integer convolutions; leave it out, or train again"
        )
    if not is_available():
        raise RequestError("--precision int8: this PyTorch has no integer convolutions on this CPU; leave it out")
