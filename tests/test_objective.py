"""What is minimized is what it says, and its draws are those of the global batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model import TwoHeadCNN, joint_loss
from mnistsum_ray.objective import Draws, Objective, adder_loss, draw, dropout_factors

CPU = torch.device("cpu")
ROWS = 50


@pytest.fixture
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN()


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    def factors(seed: int) -> torch.Tensor:
        return dropout_factors(200, 0.25, torch.Generator().manual_seed(seed))

    drawn = factors(0)
    assert drawn.shape == (200, 128, 3, 3)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    left_out = drawn == 0
    assert left_out.float().mean().item() == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(drawn[~left_out].amin(), drawn[~left_out].amax(), rtol=0, atol=0)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(factors(0), drawn, rtol=0, atol=0)
    assert (factors(1) != drawn).float().mean() > 0.3


@pytest.mark.parametrize("world_size", [2, 3, 60])
def test_the_workers_shares_are_together_what_one_worker_draws(world_size: int) -> None:
    one = draw(3, 1, 7, ROWS, 0, 1, 0.25, CPU)
    shares = [draw(3, 1, 7, ROWS, rank, world_size, 0.25, CPU) for rank in range(world_size)]
    for name in Draws._fields:
        whole = torch.empty_like(getattr(one, name))
        for rank, share in enumerate(shares):
            whole[rank::world_size] = getattr(share, name)
        assert torch.equal(whole, getattr(one, name)), name
    other = draw(3, 1, 8, ROWS, 0, 1, 0.25, CPU)
    assert not torch.equal(one.shares, other.shares)
    assert set(draw(3, 1, 7, 1000, 0, 1, 0.0, CPU).moves.tolist()) == set(range(1, 10))
    assert draw(3, 1, 7, ROWS, 0, 1, 0.0, CPU).dropout is None


def test_the_lesson_asks_for_the_sum_that_the_scores_imply(model: TwoHeadCNN) -> None:
    """Row by row in NumPy: mix, find the largest, add."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS, 10, generator=generator) * 3
    numbers = torch.randint(0, 10, (ROWS,), generator=generator)
    draws = draw(0, 0, 0, ROWS, 0, 1, 0.0, CPU)
    expected = 0.0
    for row in range(ROWS):
        own, share = scores[row].numpy(), draws.shares[row].item()
        mixed = share * own + (1 - share) * np.roll(own, int(draws.moves[row]))
        answer = model.sum_scores(torch.tensor(mixed)[None].float(), numbers[row : row + 1])
        expected += F.cross_entropy(answer, torch.tensor([mixed.argmax() + numbers[row].item()])).item()
    found = adder_loss(model, scores, numbers, draws.shares, draws.moves)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_only_the_sum_head_learns_from_the_lesson(model: TwoHeadCNN) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    draws = draw(0, 0, 0, ROWS, 0, 1, 0.0, CPU)
    torch.autograd.backward(adder_loss(model, model.digit_scores(images), numbers, draws.shares, draws.moves))
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_reported_is_the_loss_of_both_heads_alone(model: TwoHeadCNN, smoothing: float) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    digits = torch.arange(ROWS) // 5
    draws = draw(0, 0, 0, ROWS, 0, 1, 0.0, CPU)
    loss, reported = Objective(model, smoothing)(images, numbers, digits, draws)
    digit_scores, sum_scores = model(images, numbers)
    assert reported.item() == pytest.approx(joint_loss(digit_scores, sum_scores, digits, numbers).item(), rel=1e-5)
    assert not reported.requires_grad
    lesson = adder_loss(model, digit_scores, numbers, draws.shares, draws.moves)
    both = joint_loss(digit_scores, sum_scores, digits, numbers, smoothing)
    assert loss.item() == pytest.approx((both + 0.5 * lesson).item(), rel=1e-5)
