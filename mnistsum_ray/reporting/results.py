"""Results of the jobs: `fit` and `score` return them, and the commands print them as JSON."""

from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict

MANIFEST: Final = "manifest.json"
"""A run has one from its start, with its `status`; an output has one when it is finished."""


class Result(BaseModel):
    """Base of the results. Keywords that are no fields are dropped."""

    model_config = ConfigDict(frozen=True)

    def line(self) -> dict[str, Any]:
        """Return the command's JSON line: the fields that were given."""
        return self.model_dump(exclude_unset=True)


class SplitRows(Result):
    """Rows of each split, and their source: `parquet`, or a name that the task knows."""

    source: str
    train_rows: int
    validation_rows: int
    test_rows: int


class HeldOutMetrics(Result):
    """Quality on the test rows: with `loss`, the mean of the task's metrics by their names.

    Accuracies are in 0..1.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    rows: int
    loss: float

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float: ...


class TrainResult(Result):
    """Result of a finished training: folders or URIs, counts and metrics."""

    run: str
    model: str
    parameters: int
    data: SplitRows
    test: HeldOutMetrics
    rows_per_second: float
    """Training rows per second without the first epoch, unless it is the only one."""
    seconds: float


class ScoreResult(Result):
    """Result of a finished scoring. input_rows = scored_rows + rejected_rows + failed_rows.

    Where a label column was named, also the task's metrics, None without a labelled row.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    output: str
    """A folder or URI."""
    input_rows: int
    """Over the files whose number of rows is known."""
    scored_rows: int
    rejected_rows: int
    failed_rows: int
    """Rows of files that could not be used, where a footer says how many."""
    resumed_rows: int
    """Of input_rows, those that an earlier run had scored or rejected."""
    files: int
    failed_files: int
    rows_per_second: float
    seconds: float

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float | None: ...
