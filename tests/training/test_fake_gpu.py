"""Training, evaluation, fine-tuning and inference on a GPU that does not exist: tensors have shapes and devices, and no values.

Operations that mix devices fail, and so does what waits for the device: `item`, `nonzero`, a copy to the CPU.
"""

import ctypes
import multiprocessing
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray.train.torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.model import sum_head
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.metrics import AnswerCounts, score_rows
from mnistsum_ray.model.network import make_network, prepare_images
from mnistsum_ray.training.checkpoint import EpochProgress
from mnistsum_ray.training.preflight import preflight
from mnistsum_ray.training.trainer import EpochCounter, Trainer
from mnistsum_ray.training.worker import EventSender, Worker

CUDA = torch.device("cuda:0")
ROWS = 64


class FakeGenerator:
    """Fake tensors need no generator, and CUDA's cannot be made without CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def manual_seed(self, _: int) -> "FakeGenerator":
        return self


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that a GPU would run, and fails where a tensor on the CPU takes part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        assert {value.device for value in tensors} <= {CUDA}, f"{operation} waits for the GPU, or runs on the CPU"
        if operation.namespace == "aten":
            self.count += not (operation.is_view or "empty" in str(operation))
        return out


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function in a process with the fake GPU.

    A process of its own: autograd starts a thread for each device when it runs first, and not later.
    """
    if not shutil.which("g++") or torch.version.cuda:  # a build with CUDA ends the process of a second guard
        pytest.skip("the fake GPU needs g++, and a PyTorch without CUDA")
    library, folder = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", Path(torch.__file__).parent
    flags = [f"-I{folder}/include", f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-lc10", "-ltorch_cpu"]
    source = str(Path(__file__).with_name("fake_cuda.cpp"))
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", str(library), *flags], check=True)
    # Loaded before PyTorch is imported, which asks for its CUDA once.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), ctypes.CDLL, (str(library), ctypes.RTLD_GLOBAL)) as process:
        process.submit(fake_cuda).result()
        yield lambda function, *args, **settings: process.submit(function, *args, **settings).result()


def fake_cuda() -> None:
    """Replace what asks for CUDA itself, for the rest of this process."""

    def without_generator(function: Any) -> Any:
        return lambda *args, generator=None, **options: function(*args, **options)

    def move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        # PyTorch's own moves parameters in place, which fake ones refuse.
        for part in module.modules():
            part._parameters |= {
                name: torch.nn.Parameter(value.detach().to(device)) for name, value in part.named_parameters("", False)
            }
            part._buffers |= {name: value.to(device) for name, value in part.named_buffers("", False)}
        return module

    stack = ExitStack()
    stack.enter_context(FakeTensorMode())
    stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
    stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda: True))
    stack.enter_context(patch("torch.Generator", FakeGenerator))
    stack.enter_context(patch("torch.nn.Module.to", move))
    for name in ("rand", "randint"):
        stack.enter_context(patch(f"torch.{name}", without_generator(getattr(torch, name))))
    stack.enter_context(patch.object(ray.train.torch, "prepare_model", lambda model, **_: model))


def rows(count: int) -> dict[str, torch.Tensor]:
    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=CUDA)

    names = ("digit", "number", "row_id", "mixed_id", "checksum")
    images = {"image": integers(28, 28, dtype=torch.uint8), "affine": integers(6, dtype=torch.float32)}
    return images | {name: integers() for name in names}


def train(precision: str, count: int, **settings: Any) -> int:
    """Launches of a training step on the first of two ranks, or on the second with no rows."""
    hyperparameters = preflight(TrainConfig(data="sample", batch_size=2 * ROWS, **settings)).hyperparameters
    worker = Worker(int(not count), 2, CUDA, 1, EventSender(None, rank=1))
    trainer = Trainer(hyperparameters, worker, precision)
    counter = EpochCounter(EpochProgress(), 9, worker, torch.tensor([10, 90]))
    batch, global_rows = rows(count), 2 * count or 1
    counter.add(batch, trainer._step(batch, 0, 0, global_rows, 0.01))  # makes the optimizer's state, and constants
    with (launches := Launches()):
        counter.add(batch, trainer._step(batch, 0, 1, global_rows, 0.01))
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert not count or parameter.grad.stride() == parameter.stride(), name
    return launches.count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("count", "settings", "most"),
    [
        (ROWS, {"label_smoothing": 0.0}, {"fp32": 105, "bf16": 120}),
        (ROWS, {"recipe": "quick"}, {"fp32": 115, "bf16": 125}),
        (ROWS, {"recipe": "long"}, {"fp32": 120, "bf16": 131}),
        (0, {"recipe": "long"}, {"fp32": 150, "bf16": 150}),
    ],
    ids=["short on many rows", "quick", "long, with dropout", "an empty share"],
)
def test_a_training_step(
    gpu: Callable[..., Any], precision: str, count: int, settings: dict[str, Any], most: dict[str, int]
) -> None:
    launches = gpu(train, precision, count, **settings)
    print(f"{launches} launches")
    assert launches <= most[precision]


def compiled_mode(ranks: int) -> str:
    hyperparameters = preflight(TrainConfig(data="sample", compile=True)).hyperparameters
    with patch("torch.compile") as compiled:
        Trainer(hyperparameters, Worker(0, ranks, CUDA, 1, EventSender(None, rank=1)), "fp32")
    return str(compiled.call_args.kwargs["mode"])


def test_ddp_is_not_compiled_to_graphs(gpu: Callable[..., Any]) -> None:
    assert [gpu(compiled_mode, ranks) for ranks in (1, 2)] == ["reduce-overhead", "default"]


def evaluate() -> None:
    model, counts, batch = make_network().to(CUDA).eval(), AnswerCounts(CUDA), rows(5)
    with Launches(), torch.no_grad():
        for scored, scores in score_rows(model, [(batch, model.digit_scores(prepare_images(batch["image"])))]):
            counts.add(scored, scores)


def test_evaluation(gpu: Callable[..., Any]) -> None:
    gpu(evaluate)


def finetune(steps: int) -> float:
    """Launches a step."""
    model = make_network().to(CUDA)
    with (launches := Launches()):
        sum_head.finetune_sum_head(model, torch.empty(1000, 10, device=CUDA), steps, seed=0)
    return launches.count / steps


def test_finetuning_launches_few_kernels_a_step(gpu: Callable[..., Any]) -> None:
    assert gpu(finetune, 50) < 30


def infer(precision: str) -> list[tuple[int, ...]]:
    forward = make_forward(make_network().to(CUDA).eval(), CUDA, precision, None)
    with torch.inference_mode(), (launches := Launches()):
        scores = forward(rows(ROWS)["image"], rows(ROWS)["number"])
    assert launches.count <= 22
    assert all(values.dtype == torch.float32 for values in scores)
    return [tuple(values.shape) for values in scores]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference(gpu: Callable[..., Any], precision: str) -> None:
    assert gpu(infer, precision) == [(ROWS, 10), (ROWS, 19)]
