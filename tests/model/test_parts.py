"""The parts of any network are found, and what cannot be trained whole or calibrated is refused."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model import network, parts, sum_head
from mnistsum_ray.model.heads import DIGIT, HEADS, Head
from mnistsum_ray.model.network import Network, Objective, Scores, TwoHeadCNN, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.parts import check_network, find_parts
from mnistsum_ray.model.sum_head import finetune_sum_head
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.training.driver import fit
from mnistsum_ray.training.preflight import preflight
from tests.model import new_model, random_rows

EVEN = Head("even", 2, lambda digits, numbers: digits % 2)


class Third(TwoHeadCNN):
    """With a head that is one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(DIGIT.classes, EVEN.classes)

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        return *super().scores(digit_scores, numbers), self.even(digit_scores)


class Unused(TwoHeadCNN):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3, bias=False)
        self.conv2.bias.requires_grad_(False)  # type: ignore[union-attr]


class Softmax(TwoHeadCNN):
    """Its digit scores begin as zeros, and then any temperature leaves the sums as they are."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.conv7.weight)

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        return digit_scores, super().scores(digit_scores.softmax(1), numbers)[1]


class NoLastLayer(TwoHeadCNN):
    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        return *super().scores(digit_scores, numbers), digit_scores.view(-1, 5, 2).logsumexp(1)


class Undropped(TwoHeadCNN):
    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        return super().digit_scores(images)


class Residual(Network):
    """A residual network with batch normalization, average pooling, and weights that it makes contiguous; without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2)
        self.norm, self.block = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, DIGIT.classes, 1)
        self.fc = nn.Linear(20, 19)
        self.block.weight.data = self.block.weight.data.contiguous()

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        features = self.stem(images)
        scores: Tensor = self.head(features + F.relu(self.norm(self.block(features)))).mean((2, 3))
        return scores

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        return digit_scores, self.fc(torch.cat([digit_scores, self.one_hot[numbers]], 1))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Network], int], Network]:
    """Make networks of another class, with the first so many heads."""

    def use(made: type[Network], heads: int) -> Network:
        monkeypatch.setattr(network, made.__name__, made, raising=False)
        monkeypatch.setattr(network, "NETWORK", made.__name__)
        for module in (parts, sum_head):
            monkeypatch.setattr(module, "HEADS", (*HEADS, EVEN)[:heads])
        torch.manual_seed(0)
        return make_network()

    return use


def test_the_parts_of_the_network() -> None:
    model = new_model()
    found = find_parts(model)
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    assert [names[value] for value in found.hidden_weights] == [f"conv{index}.weight" for index in range(2, 7)] + ["fc1.weight"]
    assert [names[value] for value in found.head_parameters] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert found.last_layers == {"digit": model.conv7, "sum": model.fc2}
    check_network(dropout=0.2)


def test_a_third_head_is_calibrated_and_fine_tuned(use: Callable[..., Third]) -> None:
    model = use(Third, 3)
    check_network(0.2)
    images, _, numbers = random_rows(50)
    temperatures = {"digit": 2.0, "sum": 0.5, "even": 3.0}
    with torch.no_grad():
        before = model(prepare_images(images), numbers)
        find_parts(model).fold_temperatures(temperatures)
        after = model(prepare_images(images), numbers)
        for scores, folded, temperature in zip(before, after, temperatures.values(), strict=True):
            torch.testing.assert_close(folded * temperature, scores, rtol=1e-4, atol=1e-4)
    digits = 9 * F.one_hot(torch.arange(50) % 10, 10).float()
    finetune_sum_head(model, digits, 100, seed=0)
    with torch.no_grad():
        assert torch.equal(model.scores(digits, numbers)[2].argmax(1), torch.arange(50) % 2)


@pytest.mark.parametrize(
    ("made", "heads", "dropout", "said"),
    [
        (Unused, 2, 0.0, "no gradient arrives at conv2.bias, spare.weight"),
        (TwoHeadCNN, 3, 0.0, r"its `scores` are of \[\[10\], \[19\]\] classes, and HEADS of \[\[10\], \[19\], \[2\]\]"),
        (NoLastLayer, 3, 0.0, "needs an nn.Linear or nn.Conv2d as the last layer of each head"),
        (Softmax, 2, 0.0, "the head sum cannot be calibrated"),
        (Residual, 2, 0.2, r"does not use --dropout 0\.2"),
    ],
)
def test_a_network_that_cannot_be_trained_whole_is_refused(
    use: Callable[..., Network], made: type[Network], heads: int, dropout: float, said: str
) -> None:
    use(made, heads)
    with pytest.raises(RequestError, match=said):
        check_network(dropout)


def test_a_run_is_refused_before_anything_else(use: Callable[..., Network], tmp_path: Path) -> None:
    use(Undropped, 2)
    run = preflight(TrainConfig(data="sample", recipe="long", storage_path=str(tmp_path)))
    with pytest.raises(RequestError, match="does not use --dropout"):
        fit(run, Console(io.StringIO()))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_network_with_batch_normalization_is_trained(use: Callable[..., Residual], dtype: torch.dtype) -> None:
    model = use(Residual, 2)
    check_network(0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = MuonAdamW(model, 0.0, dtype)
    find_parts(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it was only looked at"
    assert find_parts(model).hidden_weights == [model.block.weight]
    images, digits, numbers = random_rows(16)
    loss, _ = Objective(model, 0.0, dtype)(prepare_images(images), numbers, digits, None)
    torch.autograd.backward(loss / 16)
    optimizer.set_learning_rate(0.02)
    optimizer.step()
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not still
