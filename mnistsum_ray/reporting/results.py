"""Results of the jobs: `fit` and `score` return them, and the commands print them as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


class _Entries:
    """Base of results that are entries of a mapping, which may hold others too."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class SplitRows(_Entries):
    """Rows of each split, and where they come from."""

    source: str
    """`sample`, `mnist` or `parquet`."""
    train_rows: int
    validation_rows: int
    test_rows: int


@dataclass(frozen=True)
class HeldOutMetrics(_Entries):
    """Quality on the test rows, with every number for each image. Accuracies are in 0..1."""

    rows: int
    pairs: int
    """Each row with each number."""
    loss: float
    """Mean of the heads' cross-entropies, in nats."""
    digit_accuracy: float
    sum_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    run: str
    """Run folder, or its URI."""
    model: str
    """Model folder, or its URI."""
    parameters: int
    data: SplitRows
    test: HeldOutMetrics
    images_per_second: float
    """Training rows per second without the first epoch, unless it is the only one."""
    seconds: float

    def line(self) -> dict[str, Any]:
        """The command's JSON line."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreResult(_Entries):
    """Result of a finished scoring. input_rows = scored_rows + rejected_rows + failed_rows."""

    output: str
    """Output folder, or its URI."""
    input_rows: int
    """Over the files whose number of rows is known."""
    scored_rows: int
    rejected_rows: int
    failed_rows: int
    """Rows of files that could not be used, where a footer says how many."""
    resumed_rows: int
    """Rows of those that an earlier run had scored."""
    files: int
    failed_files: int
    rows_per_second: float
    seconds: float
    digit_accuracy: float | None = None
    """Accuracies in 0..1; None without a labelled row."""
    sum_accuracy: float | None = None

    def line(self, *, labels: bool) -> dict[str, Any]:
        """The command's JSON line; `labels`: with accuracies, since a label column was named."""
        line = asdict(self)
        return {name: line[name] for name in line if labels or not name.endswith("_accuracy")}
