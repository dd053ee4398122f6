"""Results of `fit` and `score`: what the jobs print as their last line."""

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class TrainingRows:
    """Rows of each split, and where they come from."""

    source: str
    """`sample`, `mnist`, or the folder or URI."""
    train_rows: int
    validation_rows: int
    test_rows: int


@dataclass(frozen=True)
class TestMetrics:
    """Quality on the test rows, with every number 0..9 for each image."""

    __test__ = False  # not a test, whatever pytest thinks of its name

    rows: int
    pairs: int
    """Ten for each row."""
    loss: float
    """Mean of both heads' cross-entropies, in nats."""
    digit_accuracy: float
    """0..1"""
    sum_accuracy: float
    """0..1"""


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    run: str
    """Run folder, or its URI."""
    model: str
    """Model folder, or its URI."""
    parameters: int
    data: TrainingRows
    test: TestMetrics
    images_per_second: float
    """Training rows per second without the first epoch."""
    seconds: float
    mlflow: str | None = None
    """Id of the MLflow run."""

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Self:
        """Make it of the fields of the job's last line."""
        return cls(**line | {"data": TrainingRows(**line["data"]), "test": TestMetrics(**line["test"])})

    def to_dict(self) -> dict[str, Any]:
        """The fields of the job's last line."""
        line = asdict(self)
        if self.mlflow is None:
            del line["mlflow"]
        return line


@dataclass(frozen=True)
class ScoreResult:
    """Result of a finished scoring. input_rows = scored_rows + rejected_rows, over the files that can be read."""

    output: str
    """Output folder, or its URI."""
    input_rows: int
    scored_rows: int
    rejected_rows: int
    resumed_rows: int
    """Rows of those that an earlier run had committed."""
    files: int
    failed_files: int
    rows_per_second: float
    seconds: float
    label_column: bool = False
    """Whether a column of labels was named."""
    digit_accuracy: float | None = None
    """0..1; None without a labelled row."""
    sum_accuracy: float | None = None
    set_aside: bool = False
    """Whether this run rejected rows or left out files, besides those that an earlier run had set aside."""

    @classmethod
    def from_dict(cls, line: dict[str, Any], *, set_aside: bool) -> Self:
        """Make it of the fields of the job's last line."""
        return cls(**line, label_column="digit_accuracy" in line, set_aside=set_aside)

    @property
    def complete(self) -> bool:
        """Whether every row of every file was scored."""
        return not self.rejected_rows and not self.failed_files

    def to_dict(self) -> dict[str, Any]:
        """The fields of the job's last line: with accuracies if a column of labels was named."""
        line = asdict(self)
        del line["set_aside"]
        if not line.pop("label_column"):
            del line["digit_accuracy"], line["sum_accuracy"]
        return line
