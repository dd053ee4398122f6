"""What a run is: a frozen pydantic model, filled from a YAML file and the command line, which wins."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)


class JobConfig(BaseSettings):
    """Base of the jobs' configs: only YAML and the command line fill it, never the environment."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True
    )

    config: Path | None = Field(None, description="YAML file with any of these settings; the command line wins")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # A variable named SEED or NAME in somebody's shell must not change a run.
        return (init_settings,)


@dataclass(frozen=True)
class Hyperparameters:
    """What a training run's numbers depend on beside the data, all decided; see the fields of the same names below."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    max_shift: int
    distortion: float
    label_smoothing: float
    dropout: float
    sum_head_steps: int
    seed: int
    precision: str | None
    """None: what is faster on all the workers."""
    compile: bool


class TrainConfig(JobConfig):
    """Everything that a training run is told. What is unset follows from the data and the cluster."""

    data: str = Field(
        "auto",
        description="auto (full MNIST where it lies or downloads, else the bundled sample), sample, mnist (never the sample), "
        "or a folder or URI with IDX files or Parquet",
    )
    recipe: Literal["short", "long"] = Field("short", description="short, or long: more epochs of distorted images, for accuracy")
    epochs: int | None = Field(
        None, ge=1, le=10_000, description="passes over the training rows [5, long 30; under 20,000 rows 6, long 40]"
    )
    batch_size: int | None = Field(
        None, ge=1, le=65_536, description="rows in one step, all workers together [256, long 128; 64 under 20,000 rows]"
    )
    learning_rate: float = Field(
        0.02, gt=0, allow_inf_nan=False, description="peak of the one-cycle schedule, of Muon; AdamW's is a share of it"
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled weight decay")
    max_shift: int | None = Field(
        None,
        ge=0,
        le=8,
        description="move training images by up to so many pixels [2; 1 under 20,000 rows; 0 with --recipe long]",
    )
    distortion: float | None = Field(
        None,
        ge=0,
        le=4,
        description="how strongly to turn, stretch, slant and move training images [0; 1 with --recipe long]",
    )
    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the uniform distribution in the targets of both heads [0; 0.05 with --recipe long]",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="share of the last hidden activations that training leaves out [0; 0.25 with --recipe long]"
    )
    sum_head_steps: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="steps of fine-tuning the sum head alone, after the last epoch [20000; under 20,000 rows 4000]",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="decides initial weights, order, numbers, shifts, distortions, dropout and fine-tuning"
    )
    num_workers: int | tuple[int, int] | None = Field(
        None, description="N, or MIN,MAX for an elastic run [one a GPU; without GPUs, one a node]"
    )
    use_gpu: bool | None = Field(None, description="true or false [true where the cluster has GPUs]")
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="bf16 or fp32 [bf16 where the hardware is faster with it, else fp32]"
    )
    compile: CliImplicitFlag[bool] = Field(
        False, description="torch.compile the network, on GPUs into CUDA graphs; takes a C++ compiler and a minute to begin"
    )
    storage_path: str = Field("runs", description="folder or URI (s3://…) that holds the runs; all nodes must reach it")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="name of the run [a new unique one]"
    )
    mlflow: str | None = Field(
        None,
        description="MLflow tracking server (http://…) or store (sqlite:///…) to tell of the run; takes the extra mlflow [none]",
    )
    mlflow_experiment: str = Field("mnistsum", min_length=1, description="MLflow experiment that the run belongs to")
    resume: CliImplicitFlag[bool] = Field(False, description="continue the run NAME from its last checkpoint")
    max_failures: int = Field(3, ge=0, le=1000, description="how often a lost worker is replaced before the run gives up")
    wait_seconds: float = Field(
        600, ge=0, le=86_400, description="how long to wait for an autoscaling or busy cluster before giving up"
    )

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
    def _check(self) -> Self:
        low, high = self.worker_range or (1, 1)
        if low < 1 or high < low:
            raise ValueError("--num-workers: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX")
        if self.mlflow is not None and not re.fullmatch(r"https?://[^@?#\s]+|sqlite:///[^@?#]+", self.mlflow):
            raise ValueError(
                "--mlflow: must be http(s)://HOST:PORT or sqlite:///FILE; keys belong in MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
            )
        if self.resume and self.name is None:
            raise ValueError("--resume: say which run with --name")
        return self

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """(fewest, most) workers, or None where the cluster decides."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        return self.num_workers


class ScoreConfig(JobConfig):
    """Everything that a scoring run is told. What is unset follows from the cluster."""

    model: str = Field(description="folder or URI of a run, or of its model")
    input: tuple[str, ...] = Field(
        min_length=1, description="Parquet to score: files, folders (with all below them), globs or URIs, one or more"
    )
    output: str = Field(description="folder or URI for the predictions; run the same command again to go on after a kill")
    image_column: str = Field("image", min_length=1, description="column that holds the images")
    number_column: str = Field("number", min_length=1, description="column that holds the numbers 0..9")
    label_column: str | None = Field(None, min_length=1, description="column with the true digit, to measure accuracy [none]")
    num_workers: int | None = Field(None, ge=1, description="scoring actors [one a GPU; without GPUs, one a CPU]")
    num_readers: int | None = Field(
        None,
        ge=0,
        description="tasks that read and decode for the actors; 0: each actor reads by itself [one a CPU beside GPUs; else 0]",
    )
    use_gpu: bool | None = Field(None, description="true or false [true where the cluster has GPUs]")
    precision: Literal["bf16", "fp32", "int8"] | None = Field(
        None,
        description="bf16, fp32, or int8 on CPUs, the fastest there (model.json says how it agrees with fp32) "
        "[bf16 where the hardware is faster with it, else fp32]",
    )
    batch_size: int | None = Field(None, ge=1, le=65_536, description="rows in one forward pass [256 on a CPU, 2048 on a GPU]")
    max_rows_per_file: int = Field(
        8_192, ge=1, le=10_000_000, description="most rows in one output file, and about what a kill costs a worker"
    )
    strict: CliImplicitFlag[bool] = Field(False, description="publish nothing if any file or row cannot be used")
    overwrite: CliImplicitFlag[bool] = Field(
        False,
        description="score everything afresh and then replace what the output holds: in one step on a local Linux file system; "
        "elsewhere file by file at the end, each old or new at any time, never gone",
    )
    wait_seconds: float = Field(
        600, ge=0, le=86_400, description="how long to wait for an autoscaling or busy cluster before giving up"
    )

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        columns = [self.image_column, self.number_column]
        if len(set(columns)) < len(columns):
            raise ValueError(f"--image-column, --number-column: {self.image_column!r} cannot be both")
        if self.label_column == self.image_column:
            raise ValueError(f"--label-column: {self.image_column!r} is the image column")
        if self.precision == "int8" and self.use_gpu:
            raise ValueError("--precision int8: is for CPUs; leave it or --use-gpu out")
        return self


class ExportPairsConfig(JobConfig):
    """What the exporter of example input is told."""

    data: str = Field("auto", description="as for jobs/train.py: auto, sample, mnist, or a folder or URI")
    split: Literal["train", "validation", "test"] = Field("test", description="rows of the data that are taken, in their order")
    output: str = Field(description="folder or URI for the files; it must be empty or not there")
    rows: int = Field(10_000, ge=1, description="rows in all; more than the split has: around again, with other numbers")
    files: int = Field(8, ge=1, le=1_000_000, description="files, of about equal size")
    seed: int = Field(0, ge=0, lt=2**63, description="decides the numbers")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.files > self.rows:
            raise ValueError(f"--files {self.files}: more than there are rows ({self.rows})")
        return self


class ExportModelConfig(JobConfig):
    """What the exporter of models is told."""

    model: str = Field(description="folder or URI of a run, or of its model")
    output: str = Field(description="folder or URI for the files; it must be empty or not there")
