"""Frozen configs of the jobs. A YAML file and the command line fill them; the command line wins.

The text below a field is its help; brackets in it hold the value of an unset field.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mnistsum_ray.storage.uri import KEYS_REFUSED, may_hold_keys


class JobConfig(BaseModel):
    """Base of all configs."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # messages would quote the values, and so keys
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys(cls, given: Any) -> Any:
        for name, value in given.items():
            texts = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(text, str) and may_hold_keys(text) for text in texts):
                raise ValueError(f"`{name}`: {KEYS_REFUSED}")
        return given


RecipeName = Literal["quick", "short", "long"]

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "quick": {
        "epochs": 1,
        "batch_size": 128,
        "learning_rate": 0.05,
        "distortion": 0.5,
        "label_smoothing": 0.05,
        "dropout": 0.0,
    },
    "short": {
        "epochs": 5,
        "batch_size": 256,
        "learning_rate": 0.02,
        "distortion": 0.5,
        "label_smoothing": 0.0,
        "dropout": 0.0,
    },
    "long": {
        "epochs": 30,
        "batch_size": 128,
        "learning_rate": 0.02,
        "distortion": 1.0,
        "label_smoothing": 0.05,
        "dropout": 0.25,
    },
}

# An epoch of few rows has few steps, so its batches are smaller, and `quick` and `long` have more
# epochs. Few steps need a higher learning rate and label smoothing.
FOR_FEW_ROWS: Final[dict[str, dict[str, Any]]] = {
    "quick": {"epochs": 3, "batch_size": 64},
    "short": {
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.05,
        "label_smoothing": 0.05,
    },
    "long": {"epochs": 40, "batch_size": 64},
}
"""What is different with fewer than SMALL_ROWS training rows."""

SMALL_ROWS: Final = 20_000


def recipe_defaults(name: str, *, small: bool) -> dict[str, Any]:
    """Hyperparameters that a recipe sets; `small` for fewer than SMALL_ROWS training rows."""
    return RECIPES[name] | (FOR_FEW_ROWS[name] if small else {})


def _recipe(field: str, text: str, **limits: Any) -> Any:
    """An optional field that the recipe sets: its help is the text, and the recipes' values."""
    values = _of_recipes(field, small=False)
    for_few_rows = _of_recipes(field, small=True)
    if for_few_rows != values:
        values += f"; under {SMALL_ROWS:,} rows {for_few_rows}"
    return Field(default=None, description=f"{text} [{values}]", **limits)


def _of_recipes(field: str, *, small: bool) -> str:
    values = [f"{name} {recipe_defaults(name, small=small)[field]:g}" for name in RECIPES]
    return ", ".join(values)


class LabelledDataConfig(JobConfig):
    """Where images with their digits are from."""

    data: str = "auto"
    """auto (full MNIST if it is found or can be downloaded, else the bundled sample), sample, mnist
    (never the sample), or a folder or URI of MNIST's files or Parquet"""
    image_column: str = Field(default="image", min_length=1)
    """column of the images in Parquet"""
    label_column: str | None = Field(default=None, min_length=1)
    """column of the digits in Parquet: integers, whole floats or their text [digit or label]"""


class TrainConfig(LabelledDataConfig):
    """Config of a training run. Unset fields follow from the data and the cluster."""

    skip_bad_rows: bool = False
    """train without the rows that cannot be used, and count them in manifest and report"""
    init_from: str | None = None
    """run or model folder (or URI) whose weights the training begins with [new weights]"""
    recipe: RecipeName = "short"
    """quick: as accurate as the original, in less time; long: more epochs, with dropout and
    stronger distortion, for higher accuracy"""
    epochs: int | None = _recipe("epochs", "passes over the training rows", ge=1, le=1000)
    # The second convolution makes 50,176 values of a row, and kernels of GPUs count to 2^31.
    batch_size: int | None = _recipe("batch_size", "rows of a step of all workers", ge=1, le=32_768)
    learning_rate: float | None = _recipe("learning_rate", "highest rate of Muon", gt=0, lt=1e6)
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """decoupled weight decay"""
    distortion: float | None = _recipe("distortion", "strength of random distortions", ge=0, le=4)
    label_smoothing: float | None = _recipe("label_smoothing", "share of other labels", ge=0, lt=1)
    dropout: float | None = _recipe("dropout", "dropout rate of the last hidden layer", ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of initial weights, order, numbers, augmentation and dropout"""
    num_workers: int | tuple[int, int] | None = None
    """training workers: N, or MIN,MAX for elastic training [one per GPU, but at least 256 rows of a
    batch each; without GPUs, one]"""
    use_gpu: bool | None = None
    """train on GPUs [true if the cluster has GPUs]"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the forward pass [bf16 if it is faster on all workers, else fp32]"""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPUs that a worker reserves, and its threads, which decide the last bits of the weights [all
    CPUs of a node]"""
    max_failures: int = Field(default=3, ge=0, le=1000)
    """failures of workers and nodes to recover from in the whole run; nodes that announce their end
    do not count"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""
    storage_path: str = "runs"
    """folder or URI (s3://...) that holds the runs; all nodes must reach it"""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """name of the run and of its folder [a new unique name]"""
    resume: bool | Literal["auto"] = False
    """continue the run --name from its last checkpoint; auto: begin it if there is none"""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _parse_workers(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) and "," in value else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked = self.num_workers if self.num_workers is not None else 1
        low, high = asked if isinstance(asked, tuple) else (asked, asked)
        if not 1 <= low <= high:
            raise ValueError("`num_workers`: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX")
        if self.resume and self.name is None:
            raise ValueError("`resume`: needs `name`, the run to continue")
        return self


@dataclass(frozen=True)
class Hyperparameters:
    """Settings of TrainConfig that the trained weights depend on, besides the data."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    distortion: float
    label_smoothing: float
    dropout: float
    seed: int
    precision: str | None
    """None: bf16 if it is faster on all workers, else fp32."""


class ScoreConfig(JobConfig):
    """Config of a scoring run. Unset fields follow from the cluster."""

    model: str
    """folder or URI of a training run, or of its model folder"""
    input: tuple[str, ...] = Field(min_length=1)
    """Parquet to score: one or more files, folders (with subfolders), globs or URIs"""
    output: str
    """folder or URI for the predictions; the same command continues after a kill"""
    image_column: str = Field(default="image", min_length=1)
    """column of the images"""
    number_column: str = Field(default="number", min_length=1)
    """column of the numbers, integers from 0"""
    label_column: str | None = Field(default=None, min_length=1)
    """column of the true digits, to measure accuracy; any other value counts as unknown [none]"""
    probabilities: bool = False
    """add the probabilities of all digits and sums: lists digit_probs and sum_probs"""
    strict: bool = False
    """write no manifest, and exit with 1, if any file or row cannot be scored"""
    overwrite: bool = False
    """delete an earlier output first, and score everything again"""
    rescore_changed: bool = False
    """score files again that have changed since they were scored; without it they are refused"""
    keep_gone: bool = False
    """leave the output of files that are not in the input now; without it, it is refused"""
    # Of 784 bytes each, Arrow's limit is 2.7 million.
    max_rows_per_file: int | None = Field(default=None, ge=1, le=2_000_000)
    """maximum rows in an output file, and what a worker loses in a kill [a quarter of the input
    file, but 8192 to 32768]"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the network, which one output keeps [bf16 if it is faster, else fp32]"""
    # conv2 computes 50,176 values a row: GPU kernels with indices of 32 bits take at most 42,799
    # rows, and this is well below.
    batch_size: int | None = Field(default=None, ge=1, le=16_384)
    """rows per forward pass [256 on CPUs, 2048 on GPUs]"""
    num_workers: int | None = Field(default=None, ge=1)
    """scoring workers [four per GPU; without GPUs, one per CPU]"""
    use_gpu: bool | None = None
    """score on GPUs [true if the cluster has GPUs]"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_column in (self.number_column, self.label_column):
            columns = "`image_column`, `number_column`, `label_column`"
            raise ValueError(f"{columns}: images need a column of their own")
        return self


class ExportPairsConfig(LabelledDataConfig):
    """Config of an export of pairs."""

    split: Literal["train", "validation", "test"] = "test"
    """split whose rows are exported, in their order: train, validation or test"""
    output: str
    """folder or URI for the files; it must be empty or not exist"""
    rows: int = Field(default=10_000, ge=1)
    """total rows; beyond the end of the split it repeats with other numbers"""
    files: int = Field(default=8, ge=1, le=1_000_000)
    """number of files, of about equal size"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of the numbers"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.files > self.rows:
            raise ValueError(f"`files` {self.files}: more files than rows ({self.rows})")
        return self


class PredictConfig(JobConfig):
    """Config of a prediction for one picture."""

    picture: str
    """file or URI of a picture of one digit, of any size, darker or lighter than its background"""
    number: int
    """number that is added to the digit, from 0"""
    model: str
    """folder or URI of a training run, or of its model folder"""
