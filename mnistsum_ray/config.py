"""Frozen configs of the jobs. A YAML file and the command line fill them; the command line wins.

The text below a field is its help; brackets in it hold the value of an unset field.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mnistsum_ray.errors import RequestError, did_you_mean, shortened, spelled
from mnistsum_ray.storage.uri import SECRETS_REFUSED, hide_secrets, may_hold_secrets

if TYPE_CHECKING:  # a program may pass a Path, or a list: `_check_texts` makes texts of them
    Place: TypeAlias = str | Any
    Places: TypeAlias = tuple[str, ...] | Any
else:
    Place, Places = str, tuple[str, ...]


class JobConfig(BaseModel):
    """Base of all configs. RequestError: fields are wrong; its line names each."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # messages would quote the values, and so secrets
    )

    if not TYPE_CHECKING:  # type checkers and editors then see the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                known = type(self).model_fields
                raise RequestError(explain_fields(error, str, known)) from error

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Let `help(TrainConfig)` say what each field means."""
        fields = [f"{name}: {field.description}" for name, field in cls.model_fields.items()]
        cls.__doc__ = "\n\n".join([cls.__doc__ or "", *fields])

    @field_validator("*", mode="before")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        """Make texts of paths, and refuse those that hold secrets."""
        is_list = isinstance(value, list | tuple)
        values = value if is_list else [value]
        if any(isinstance(one, Path) and re.match(r"\w+:/", str(one)) for one in values):
            raise ValueError("a Path holds no URI; give a text")  # str(Path("s3://b")) is "s3:/b"
        texts = [str(one) if isinstance(one, Path) else one for one in values]
        if any(isinstance(text, str) and may_hold_secrets(text) for text in texts):
            raise ValueError(SECRETS_REFUSED)
        return texts if is_list else texts[0]


def explain_fields(
    error: ValidationError, shown: Callable[[str], str], known: Iterable[str]
) -> str:
    """One line on all fields that are wrong or missing; `shown` makes the name of a field."""
    problems: dict[str, list[str]] = defaultdict(list)
    for found in error.errors():
        field = hide_secrets(str(found["loc"][0]))
        problem = found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            problem = "required"
        elif found["type"] == "extra_forbidden":
            problem = f"there is no such setting{did_you_mean(field, known)}"
        elif found["type"] != "value_error":  # pydantic's own; this package's say enough
            got = shortened(spelled(found["input"]))
            problem = f"{problem[:1].lower()}{problem[1:]}, got {got!r}"
        problems[shown(shortened(field))].append(problem)
    # Where a type is a union, each of its types has a problem.
    return "; ".join(f"{name}: {', or '.join(texts)}" for name, texts in problems.items())


RecipeName = Literal["quick", "short", "long"]

_RECIPES: Final[dict[str, tuple[Any, Any, Any]]] = {
    "epochs": (1, 5, 30),
    "batch_size": (128, 256, 128),
    "learning_rate": (0.05, 0.02, 0.02),
    "distortion": (0.5, 0.5, 1.0),
    "label_smoothing": (0.05, 0.0, 0.05),
    "dropout": (0.0, 0.0, 0.25),
}
"""What each recipe sets, in the order of RecipeName."""

FEW_ROWS: Final = 20_000

# An epoch of few rows has few steps, so batches are smaller, and `quick` and `long` have more
# epochs. `short` is then the same as `quick`, whose learning rate and smoothing few steps need.
_RECIPES_OF_FEW_ROWS: Final = _RECIPES | {
    "epochs": (3, 3, 40),
    "batch_size": (64, 64, 64),
    "learning_rate": (0.05, 0.05, 0.02),
    "label_smoothing": (0.05, 0.05, 0.05),
}
"""The same with fewer than FEW_ROWS training rows."""


def recipe_defaults(name: RecipeName, *, few_rows: bool) -> dict[str, Any]:
    """Hyperparameters that a recipe sets; `few_rows` for fewer than FEW_ROWS training rows."""
    recipe = get_args(RecipeName).index(name)
    table = _RECIPES_OF_FEW_ROWS if few_rows else _RECIPES
    return {field: values[recipe] for field, values in table.items()}


def _recipe(field: str, text: str, **limits: Any) -> Any:
    """An optional field that the recipe sets: its help is the text, and the recipes' values."""
    quick, short, long = _RECIPES[field]
    few = ", ".join(f"{value:g}" for value in _RECIPES_OF_FEW_ROWS[field])
    values = f"quick {quick:g}, short {short:g}, long {long:g}; under {FEW_ROWS:,} rows {few}"
    return Field(default=None, description=f"{text} [{values}]", **limits)


class LabelledDataConfig(JobConfig):
    """Where images with their digits are from."""

    data: Place = "auto"
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
    max_rows: int | None = Field(default=None, ge=1)
    """most rows of each split, for a first try with large data; of the first files [all]"""
    init_from: Place | None = None
    """run or model folder (or URI) whose weights the training begins with [new weights]"""
    dropout: float | None = _recipe("dropout", "dropout rate of the last hidden layer", ge=0, lt=1)
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the forward pass [bf16 if it is faster on all workers, else fp32]"""
    recipe: RecipeName = "short"
    """quick: the original's accuracy in less time; long: the highest, in more epochs"""
    epochs: int | None = _recipe("epochs", "passes over the training rows", ge=1, le=1000)
    # conv2 makes 50,176 values of a row, and kernels of GPUs count to 2^31.
    batch_size: int | None = _recipe("batch_size", "rows of a step of all workers", ge=1, le=32_768)
    learning_rate: float | None = _recipe("learning_rate", "highest rate of Muon", gt=0, lt=1e6)
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """decoupled weight decay"""
    distortion: float | None = _recipe("distortion", "strength of random distortions", ge=0, le=4)
    label_smoothing: float | None = _recipe("label_smoothing", "share of other labels", ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of initial weights, order, numbers, distortions and dropout"""
    num_workers: int | tuple[int, int] | None = None
    """workers: N, or MIN,MAX if elastic [one per GPU with 256 rows a batch; without GPUs, one]"""
    use_gpu: bool | None = None
    """train on GPUs [true if the cluster has GPUs]"""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPUs and threads of a worker, which decide the last bits [all CPUs of a node]"""
    max_failures: int = Field(default=3, ge=0, le=1000)
    """failures of workers to recover from; failed starts and storage are counted apart, nodes
    that announce their end not at all"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""
    storage_path: Place = "runs"
    """folder or URI (s3://...) that holds the runs; all nodes must reach it"""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """name of the run and of its folder [a new unique name]"""
    resume: bool | Literal["auto"] = False
    """continue the run --name from its last checkpoint; auto: begin it if there is none"""

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _parse_range(cls, value: Any, convert: Any) -> Any:
        is_range = isinstance(value, str) and "," in value
        workers = convert(value.split(",") if is_range else value)
        low, high = workers if isinstance(workers, tuple) else (workers, workers)
        if workers is not None and not 1 <= low <= high:
            raise ValueError("must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX")
        return workers

    @field_validator("resume")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("name", "") is None:  # an invalid name is missing there
            raise ValueError("needs --name, the run to continue")
        return value


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
    precision: str | None  # None: bf16 if it is faster on all workers, else fp32


class ScoreConfig(JobConfig):
    """Config of a scoring run. Unset fields follow from the cluster."""

    input: Places = Field(min_length=1)
    """Parquet to score: one or more files, folders (with subfolders), globs or URIs"""
    number_column: str = Field(default="number", min_length=1)
    """column of the numbers, integers in 0..9"""
    label_column: str | None = Field(default=None, min_length=1)
    """column of the true digits, to measure accuracy; any other value counts as unknown [none]"""
    image_column: str = Field(default="image", min_length=1, validate_default=True)
    """column of the images"""
    max_rows: int | None = Field(default=None, ge=1)
    """stop after the output files that hold the first so many rows, for a first try [all]"""
    model: Place
    """folder or URI of a training run, or of its model folder"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the network, fixed for an output [bf16 if it is faster, else fp32]"""
    # Far below 2^31 values, where kernels of GPUs end: conv2 makes 50,176 of a row.
    batch_size: int | None = Field(default=None, ge=1, le=16_384)
    """rows per forward pass [256 on CPUs, 2048 on GPUs]"""
    probabilities: bool = False
    """add the probabilities of all digits and sums: lists digit_probs and sum_probs"""
    output: Place
    """folder or URI for the predictions; the same command continues after a kill"""
    strict: bool = False
    """write no manifest, and exit with 1, if any file or row cannot be scored"""
    overwrite: bool = False
    """delete an earlier output first and score everything; without it a scoring goes on"""
    rescore_changed: bool = False
    """score files again that have changed since they were scored; unset, they are refused"""
    keep_gone: bool = False
    """leave the output of files that are no longer in the input; unset, such output is refused"""
    # Arrow's limit of 2^31 bytes is 2.7 million images of 784.
    max_rows_per_file: int | None = Field(default=None, ge=1, le=2_000_000)
    """most rows of an output file, and what a kill costs [a quarter of the input, 8192 to 32768]"""
    num_workers: int | None = Field(default=None, ge=1)
    """scoring workers [four per GPU; without GPUs, one per CPU]"""
    use_gpu: bool | None = None
    """score on GPUs [true if the cluster has GPUs]"""
    wait_seconds: float = Field(default=600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("image_column")
    @classmethod
    def _check_images(cls, value: str, info: ValidationInfo) -> str:
        if value in (info.data.get("number_column"), info.data.get("label_column")):
            raise ValueError("is the number's or the label's column too; images need their own")
        return value


class ExportPairsConfig(JobConfig):
    """Config of an export of pairs."""

    data: Place = "auto"
    """auto (full MNIST if it is found or can be downloaded, else the bundled sample), sample, mnist
    (never the sample), or a folder of MNIST's files"""
    split: Literal["train", "validation", "test"] = "test"
    """split whose rows are exported, in their order"""
    output: Place
    """folder or URI for the files; it must be empty or not exist"""
    rows: int = Field(default=10_000, ge=1)
    """total rows; beyond the end of the split it repeats with other numbers"""
    files: int = Field(default=8, ge=1, le=1_000_000)
    """number of files, of about equal size"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of the numbers"""


class PredictConfig(JobConfig):
    """Config of a prediction for one picture."""

    picture: Place
    """file or URI of a picture of one digit, of any size, darker or lighter than its background"""
    number: int
    """number that is added to the digit, in 0..9"""
    model: Place
    """folder or URI of a training run, or of its model folder"""
