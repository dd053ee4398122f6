"""The folders that a run writes to while it holds the output's lock."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.reporting.progress import Counter
from mnistsum_ray.scoring.output_folder import list_output, read_all_committed
from mnistsum_ray.scoring.staging import staging_folder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import OutputLock


@dataclass(frozen=True)
class Target:
    """The output folder of a run, and the folder where its parts are committed until they are published."""

    output: Location
    folder: Location
    """Where parts are committed: the output itself, or with `--overwrite` or `--strict` the staging folder."""
    staged: bool
    """Whether `folder` is the staging folder."""
    overwrite: bool
    """Whether the staged files replace the files of the output."""
    lock: OutputLock

    def merge(self, staged: pa.Table, published: pa.Table) -> pa.Table:
        """Return what the finished output will hold of the staged and the published files (`provenance.COMMITTED_SCHEMA`)."""
        if self.overwrite:
            return staged
        only_published = pc.invert(pc.is_in(published["output"], staged["output"]))
        return pa.concat_tables([staged, published.filter(only_published)])

    def read_committed(self, show: Callable[[Counter], None]) -> pa.Table:
        """Read from the files what the finished output will hold, as `provenance.COMMITTED_SCHEMA`."""
        published = read_all_committed(self.output, list_output(self.output).predictions, show)
        if not self.staged:
            return published
        return self.merge(read_all_committed(self.folder, list_output(self.folder).predictions, show), published)


def open_target(config: ScoreConfig, output: Location, lock: OutputLock) -> Target:
    """Choose the folder where a run commits its parts.

    Raises:
        RequestError: a file or a link has the staging folder's name.
    """
    staged = config.overwrite or config.strict
    folder = staging_folder(output) if staged else output
    return Target(output, folder, staged, config.overwrite, lock)
