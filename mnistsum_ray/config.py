"""Frozen configs of the jobs. A YAML file and the command line fill them; the command line wins.

The text below a field is its help; brackets in it hold the value of an unset field. The fields are declared in groups, one class
per group; `--help` shows a group under the first line of its docstring. Pydantic collects fields from the last base to the first,
so a config names its groups in reverse order.
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from mnistsum_ray.storage.uri import PathOrUri

OnEpoch = Callable[[dict[str, Any]], object]
"""Function that is called after each epoch, with its line of history.jsonl."""

PathText = Annotated[str, AfterValidator(PathOrUri)]
"""Type of a field with a path or URI: it is given as a string, and kept as a PathOrUri, which is shown without keys."""


def field_help(field: FieldInfo) -> str:
    """Meaning of a field, with its default. The description of one whose default is None gives its unset value in brackets."""
    if field.default is None:
        return field.description or ""
    return f"{field.description} ({'required' if field.is_required() else f'default: {field.default}'})"


class JobConfig(BaseModel):
    """Base of all configs and groups."""

    # Pydantic's own messages would quote URIs with their keys.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    everyday: ClassVar[tuple[str, ...]] = ()
    """Fields that `--help` shows; `--help-all` shows all. Empty: all."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Have `help` begin with the fields and their meaning: a short signature, and a docstring that lists them."""
        lines, parameters = [cls.__doc__ or "", "", "Fields:"], []
        for name, field in cls.model_fields.items():
            default = Parameter.empty if field.is_required() else field.default
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default))
            lines += textwrap.wrap(f"{name}: {field_help(field)}", 96, initial_indent="    ", subsequent_indent="        ")
        cls.__doc__, cls.__signature__ = "\n".join(lines), Signature(parameters)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take True for 1."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be no boolean")
        return value


class TrainingData(JobConfig):
    """Training data."""

    data: PathText = "auto"
    """auto (full MNIST if it is found or can be downloaded, else the bundled sample), sample, mnist (never the sample), or a
    folder or URI of IDX files or Parquet"""
    shuffle_rows: int = Field(1_000_000, ge=1, le=10**9)
    """training rows that are shuffled together, 0.8 KB each in memory; Parquet with more rows in all is streamed and shuffled in
    windows of so many rows"""
    skip_bad_rows: bool = False
    """train without the rows that cannot be used, and count them in manifest and report; Parquet that is streamed is read once
    before, to find them"""


RecipeName = Literal["quick", "short", "long"]

RECIPES: Final = {
    "epochs": ((1, 5, 30), (3, 3, 40)),
    "batch_size": ((128, 256, 128), (64, 64, 64)),
    "learning_rate": ((0.05, 0.02, 0.02), (0.05, 0.05, 0.02)),
    "distortion": ((0.5, 0.5, 1.0), (0.5, 0.5, 1.0)),
    "label_smoothing": ((0.05, 0.0, 0.05), (0.05, 0.05, 0.05)),
    "dropout": ((0.0, 0.0, 0.25), (0.0, 0.0, 0.25)),
    "sum_head_steps": ((1_000, 2_000, 2_000), (1_000, 1_000, 2_000)),
}
"""Values of the recipes quick, short and long; then those for fewer than SMALL_ROWS training rows, where runs have smaller
batches and more epochs: the sum head needs its number of steps. Few steps need a higher learning rate and label smoothing."""

SMALL_ROWS: Final = 20_000


def recipe_defaults(name: str, *, small: bool) -> dict[str, Any]:
    """Hyperparameters that a recipe sets; `small` for fewer than SMALL_ROWS training rows."""
    column = get_args(RecipeName).index(name)
    return {field: values[small][column] for field, values in RECIPES.items()}


def _of_recipe(name: str, text: str, **limits: Any) -> Any:
    """An optional field that the recipe sets: its help is the text, and in brackets the values of the recipes."""

    def listed(values: tuple[float, ...]) -> str:
        return ", ".join(f"{recipe} {value:g}" for recipe, value in zip(get_args(RecipeName), values, strict=True))

    large, small = map(listed, RECIPES[name])
    values = large if small == large else f"{large}; under {SMALL_ROWS:,} rows {small}"
    return Field(None, description=f"{text} [{values}]", **limits)


class Recipe(JobConfig):
    """Recipe and optimization."""

    recipe: RecipeName = "short"
    """quick: as accurate as the original, in less time; long: more epochs, with dropout and stronger distortion, for higher
    accuracy"""
    epochs: int | None = _of_recipe(
        "epochs", "passes over the training rows; no --patience: the last has the lowest rate, and is the best", ge=1, le=10_000
    )
    batch_size: int | None = _of_recipe("batch_size", "rows per optimizer step, all workers together", ge=1, le=65_536)
    learning_rate: float | None = _of_recipe(
        "learning_rate", "peak of Muon's one-cycle schedule; AdamW uses a fraction of it", gt=0, allow_inf_nan=False
    )
    weight_decay: float = Field(0.01, ge=0, le=10)
    """decoupled weight decay"""
    distortion: float | None = _of_recipe(
        "distortion", "strength of random rotation, scaling, shear and shift of training images", ge=0, le=4
    )
    label_smoothing: float | None = _of_recipe(
        "label_smoothing", "weight of the uniform distribution in the targets of both heads", ge=0, lt=1
    )
    dropout: float | None = _of_recipe("dropout", "dropout rate of the last hidden layer", ge=0, lt=1)
    sum_head_steps: int | None = _of_recipe(
        "sum_head_steps", "steps of fine-tuning the sum head alone after the last epoch", ge=0, le=100_000
    )
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of initial weights, order, numbers, augmentation, dropout and fine-tuning"""


class TrainingCluster(JobConfig):
    """Cluster and hardware."""

    num_workers: int | tuple[int, int] | None = None
    """training workers: N, or MIN,MAX for elastic training [one per GPU, but at least 256 rows of a batch each; without GPUs,
    one per node]"""
    use_gpu: bool | None = None
    """train on GPUs [true if the cluster has GPUs]"""
    precision: Literal["bf16", "fp32"] | None = None
    """precision of the forward pass [bf16 if it is faster on all workers, else fp32]"""
    compile: bool = False
    """use torch.compile, and on a GPU record the step as a CUDA graph; needs a C++ compiler and a minute"""
    max_failures: int = Field(3, ge=0, le=1000)
    """failures to recover from, of workers and nodes, with no new checkpoint in between"""
    wait_seconds: float = Field(600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _parse_workers(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        if len(parts) not in (1, 2) or not all(re.fullmatch(r"\s*\d+\s*", str(part)) for part in parts):
            raise ValueError("must be N or MIN,MAX")
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        low, high = self.worker_range or (1, 1)
        if low < 1 or high < low:
            raise ValueError("`num_workers`: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX")
        return self

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """(minimum, maximum) number of workers; None: as many as the cluster suggests."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        return self.num_workers


class RunFolder(JobConfig):
    """Run folder."""

    storage_path: PathText = "runs"
    """folder or URI (s3://...) that holds the runs; all nodes must reach it"""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """name of the run and of its folder [a new unique name]"""
    resume: bool | Literal["auto"] = False
    """continue the run --name from its last checkpoint; auto: begin it if there is none"""
    checkpoint_seconds: float = Field(60, gt=0, le=86_400)
    """seconds between checkpoints within an epoch; a kill costs about so much work"""
    from_run: PathText | None = None
    """run (folder or URI) whose data, recipe, seed, precision, workers and threads are taken; other flags win; on the same kind
    of CPUs the model is then the same to the last bit [none]"""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.resume and self.name is None:
            raise ValueError("`resume`: needs `name`, the run to continue")
        if self.resume is True and self.from_run is not None:
            raise ValueError("`from_run`: starts a new run, and `resume` continues one; leave one of them out, or `resume` auto")
        return self


class Tracking(JobConfig):
    """MLflow tracking (needs the extra mlflow)."""

    mlflow: PathText | None = None
    """MLflow tracking server (http://...) or store (sqlite:///...) that the finished run is logged to [none]"""
    mlflow_experiment: str = Field("mnistsum", min_length=1)
    """MLflow experiment of the run"""
    mlflow_model: str = Field("mnistsum", pattern=r"^[^/:]*[^/:\s][^/:]*$")
    """MLflow registered model; the trained model becomes its newest version"""

    @model_validator(mode="after")
    def _check_mlflow(self) -> Self:
        # A part that a PathOrUri does not show may be a key.
        if self.mlflow is not None and (
            PathOrUri(self.mlflow).has_keys or not re.fullmatch(r"https?://[^@?#\s]+|sqlite:///[^@?#]+", self.mlflow)
        ):
            raise ValueError(
                "`mlflow`: must be http(s)://HOST:PORT or sqlite:///FILE; keys belong in MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
            )
        return self


class TrainConfig(Tracking, RunFolder, TrainingCluster, Recipe, TrainingData):
    """Config of a training run. Unset fields follow from the data and the cluster."""

    everyday = ("data", "recipe", "epochs", "seed", "num_workers", "use_gpu", "storage_path", "name", "resume", "from_run")


@dataclass(frozen=True)
class Hyperparameters:
    """Settings that the trained weights depend on, besides the data; the fields of the same names in TrainConfig."""

    epochs: int
    batch_size: int
    shuffle_rows: int
    learning_rate: float
    weight_decay: float
    distortion: float
    label_smoothing: float
    dropout: float
    sum_head_steps: int
    seed: int
    precision: str | None
    """None: bf16 if it is faster on all workers, else fp32."""
    compile: bool


class ScoringModel(JobConfig):
    """Model and inference."""

    model: PathText
    """folder or URI of a training run, or of its model folder"""
    precision: Literal["bf16", "fp32", "int8"] | None = None
    """precision of the network; int8 is the fastest on CPUs, and model.json says how often it gives the same answers as the
    precision of the run [that of the output's predictions, else bf16 if it is faster, else fp32]"""
    # conv2 computes 50,176 values a row, and kernels of GPUs that index with 32 bits take 42,799 rows at most.
    batch_size: int | None = Field(None, ge=1, le=16_384)
    """rows per forward pass [256 on CPUs, 2048 on GPUs]"""


class ScoringInput(JobConfig):
    """Input."""

    input: tuple[PathText, ...] = Field(min_length=1)
    """Parquet to score: one or more files, folders (with subfolders), globs or URIs"""
    image_column: str = Field("image", min_length=1)
    """column of the images"""
    number_column: str = Field("number", min_length=1)
    """column of the numbers, integers from 0"""
    label_column: str | None = Field(None, min_length=1)
    """column of the true digits, to measure accuracy; any other value counts as unknown, and is counted unless null [none]"""

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.image_column == self.number_column:
            raise ValueError(f"`image_column`, `number_column`: {self.image_column!r} cannot be both")
        if self.label_column == self.image_column:
            raise ValueError(f"`label_column`: {self.image_column!r} is the image column")
        return self


class ScoringOutput(JobConfig):
    """Output."""

    output: PathText
    """folder or URI for the predictions; the same command continues after a kill"""
    max_rows_per_file: int | None = Field(None, ge=1, le=10_000_000)
    """maximum rows in an output file, and about what each worker loses in a kill [as the output was begun, else a quarter of the
    input file, but 8192 to 32768]"""
    probabilities: bool = False
    """add the probabilities of all digits and of all sums: digit_probs and sum_probs, lists of 10 and of 19"""
    strict: bool = False
    """write no manifest, and exit with 1, if any file or row cannot be scored"""
    overwrite: bool = False
    """delete an earlier output first, and score everything again"""


class ScoringCluster(JobConfig):
    """Cluster and hardware."""

    num_workers: int | None = Field(None, ge=1)
    """scoring workers [up to 8 per GPU, as CPUs and memory allow; without GPUs, one per CPU]"""
    use_gpu: bool | None = None
    """score on GPUs [true if the cluster has GPUs]"""
    wait_seconds: float = Field(600, ge=0, le=86_400)
    """seconds to wait for an autoscaling or busy cluster before giving up"""


class ScoreConfig(ScoringCluster, ScoringOutput, ScoringInput, ScoringModel):
    """Config of a scoring run. Unset fields follow from the cluster."""

    everyday = ("model", "input", "output", "label_column", "precision", "num_workers", "use_gpu", "strict", "overwrite")

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.precision == "int8" and self.use_gpu:
            raise ValueError("`precision` int8: runs on CPUs only; leave out `precision` or `use_gpu`")
        return self


class ExportPairsConfig(JobConfig):
    """Pairs to export."""

    data: PathText = "auto"
    """as for mnistsum train: auto, sample, mnist, or a folder or URI"""
    split: Literal["train", "validation", "test"] = "test"
    """split whose rows are exported, in their order"""
    output: PathText
    """folder or URI for the files; it must be empty or not exist"""
    rows: int = Field(10_000, ge=1)
    """total rows; beyond the end of the split it repeats with other numbers"""
    files: int = Field(8, ge=1, le=1_000_000)
    """number of files, of about equal size"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of the numbers"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.files > self.rows:
            raise ValueError(f"`files` {self.files}: more files than rows ({self.rows})")
        return self


class ExportModelConfig(JobConfig):
    """Model to export."""

    model: PathText
    """folder or URI of a training run, or of its model folder"""
    output: PathText
    """folder or URI for the files; it must be empty or not exist"""


class PredictConfig(JobConfig):
    """Picture, number and model."""

    picture: PathText
    """file or URI of a picture of one digit, of any size, darker or lighter than its background"""
    number: int
    """number that is added to the digit, from 0"""
    model: PathText
    """folder or URI of a training run, or of its model folder"""
    prepare: bool = True
    """prepare the picture as MNIST's were; else its 28 x 28 pixels are taken as they are"""
