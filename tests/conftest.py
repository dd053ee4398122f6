"""Data that the tests share: small, real, and made on the spot."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mnistsum_ray import load_model
from mnistsum_ray.data.columns import Images
from mnistsum_ray.data.columns.base import Array, one_chunk
from mnistsum_ray.mnist.datasets import SAMPLE
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model import folder as model_folder
from mnistsum_ray.model.folder import copy_weights, describe_model
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.task_loader import code_of
from tests.jobs import end_jobs


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home folder of the tests.

    Ray writes ~/.ray/auth_token when a test starts a cluster, and each cluster that the user starts
    later would ask for it. The commands buffer what they print, as in a user's shell.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """A test that fails leaves no job on the CPUs of the tests that follow."""
    yield
    end_jobs()


@pytest.fixture(scope="session")
def sample() -> pa.Table:
    """The bundled sample: `image` (784 bytes) and `digit`, sorted by digit."""
    return pq.read_table(SAMPLE)


@pytest.fixture(scope="session")
def pixels(sample: pa.Table) -> Array:
    """The images of the sample, uint8[5000, 28, 28]."""
    return Images(28, 28).view(one_chunk(sample["image"]))


def write_sample(path: Path, rows: int) -> Path:
    """Write so many rows of the sample, all digits alike, as one Parquet file; return its path."""
    table = pq.read_table(SAMPLE)
    pq.write_table(table[:: len(table) // rows], path, row_group_size=200)
    return path


def write_model(folder: Path, seed: int) -> Path:
    """Write a model folder of the built-in task with random weights."""
    torch.manual_seed(seed)
    weights = copy_weights(MnistSum().network())
    accuracies = dict.fromkeys(("loss", "digit_accuracy", "sum_accuracy"), 0.0)
    metrics = {split: {"rows": 500} | accuracies for split in ("validation", "test")}
    description = describe_model(MnistSum(), weights, code_of(MnistSum), epoch=1, **metrics)
    model_folder.write_model(locate(str(folder), "--model"), weights, description)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", 0)


def plain_predictions(
    model: Path, images: np.ndarray, numbers: np.ndarray
) -> dict[str, np.ndarray]:
    """Predictions of plain PyTorch for uint8[n, 28, 28] and int64[n]."""
    batch = {"image": torch.tensor(images), "number": torch.tensor(numbers)}
    with torch.inference_mode():
        heads = load_model(model)(batch)
    (digit_prob, digit), (sum_prob, total) = (head.softmax(1).max(1) for head in heads)
    return {
        "pred_digit": digit.numpy(),
        "digit_prob": digit_prob.numpy(),
        "pred_sum": total.numpy(),
        "sum_prob": sum_prob.numpy(),
        "consistent": (total == digit + torch.tensor(numbers)).numpy(),
    }


def check_predictions(table: pa.Table, expected: dict[str, np.ndarray]) -> None:
    """Assert that a table has these predictions, row for row."""
    for name in ("pred_digit", "pred_sum", "consistent"):
        assert table[name].to_pylist() == expected[name].tolist(), name
    for name in ("digit_prob", "sum_prob"):
        assert np.allclose(table[name].to_numpy(), expected[name], atol=1e-5), name
