"""Results of the jobs: `fit` and `score` return them, a notebook shows them, and the commands print them as JSON."""

import base64
import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import HeadFields
from mnistsum_ray.reporting.console import accuracies
from mnistsum_ray.storage.paths import locate


class _Entries:
    """Base of results that are entries of a mapping, which may hold others too."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class SplitRows(_Entries):
    """Rows of each split, and where they come from."""

    source: str
    """`sample`, `mnist` or `parquet`."""
    train_rows: int
    validation_rows: int
    test_rows: int


@dataclass(frozen=True)
class HeldOutMetrics(_Entries, HeadFields, names=("{}_accuracy",)):
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
    mlflow: str | None = None
    """Id of the MLflow run, if it was logged."""

    def line(self) -> dict[str, Any]:
        """The command's JSON line."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _repr_html_(self) -> str | None:
        right = f"{accuracies(vars(self.test))} of {self.test.rows:,} test rows, all {NUMBERS} numbers"
        return _with_picture(f"{self.run}: {right}; {self.seconds:.0f} s", self.run, "mistakes.png")


@dataclass(frozen=True)
class ScoreResult(HeadFields, names=("{}_accuracy",)):
    """Result of a finished scoring. input_rows = scored_rows + rejected_rows + failed_rows, over the
    files whose number of rows is known."""

    output: str
    """Output folder, or its URI."""
    input_rows: int
    scored_rows: int
    rejected_rows: int
    failed_rows: int
    """Rows of files that could not be used, where a footer says how many."""
    resumed_rows: int
    """Rows of those that an earlier run had committed."""
    files: int
    failed_files: int
    rows_per_second: float
    seconds: float
    digit_accuracy: float | None = None
    """Accuracies in 0..1; None without a labelled row."""
    sum_accuracy: float | None = None

    def line(self, *, labels: bool) -> dict[str, Any]:
        """The command's JSON line; `labels`: with accuracies, since a label column was named."""
        return {name: value for name, value in asdict(self).items() if labels or not name.endswith("_accuracy")}

    def _repr_html_(self) -> str | None:
        rows = f"{self.scored_rows:,} of {self.input_rows:,} rows scored, {self.rejected_rows:,} rejected"
        right = f"; {accuracies(vars(self))}" if self.digit_accuracy is not None else ""
        return _with_picture(f"{self.output}: {rows}{right}; {self.seconds:.0f} s", self.output, "probabilities.png")

    @property
    def complete(self) -> bool:
        """Whether every row of every file was scored."""
        return not self.rejected_rows and not self.failed_files


def _with_picture(text: str, folder: str, picture: str) -> str | None:
    """HTML of a text and a picture of a run's report; None, for which a notebook shows the fields, without the picture."""
    try:
        png = base64.b64encode((locate(folder, "run") / picture).read_bytes()).decode()
    except (OSError, ValueError):  # it is deleted, or its storage does not answer or takes other credentials
        return None
    return f'<p>{html.escape(text)}</p><img alt="{picture}" style="max-width: 100%" src="data:image/png;base64,{png}">'
