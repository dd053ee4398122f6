"""What is minimized is what it says, and its draws are those of the global batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model import TwoHeadCNN, joint_loss
from mnistsum_ray.objective import Draws, Objective, adder_loss, draw, dropout_factors, share_of

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


def drawn(step: int = 7, rows: int = ROWS, *, lesson: bool = True, dropout: float = 0.0) -> Draws:
    return draw(3, 1, step, rows, lesson=lesson, dropout=dropout, device=CPU)


def lesson_of(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    assert draws.lesson is not None
    return draws.lesson


@pytest.mark.parametrize("world_size", [2, 3, 60])
def test_the_workers_shares_are_together_what_one_worker_draws(world_size: int) -> None:
    def tensors(draws: Draws) -> tuple[torch.Tensor, ...]:
        assert draws.dropout is not None
        return *lesson_of(draws), draws.dropout

    one = drawn(dropout=0.25)
    shares = [tensors(share_of(one, rank, world_size)) for rank in range(world_size)]
    for index, whole in enumerate(tensors(one)):
        together = torch.empty_like(whole)
        for rank, share in enumerate(shares):
            together[rank::world_size] = share[index]
        assert torch.equal(together, whole)


def test_each_step_draws_anew_and_only_what_it_needs() -> None:
    shares, moves = lesson_of(drawn(rows=1000))
    assert not torch.equal(shares, lesson_of(drawn(step=8, rows=1000))[0])
    assert set(moves.tolist()) == set(range(1, 10))
    assert drawn(lesson=False) == share_of(drawn(lesson=False), 0, 2) == (None, None)


def test_the_lesson_asks_for_the_sum_that_the_scores_imply(model: TwoHeadCNN) -> None:
    """Row by row in NumPy: mix, find the largest, add."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS, 10, generator=generator) * 3
    numbers = torch.randint(0, 10, (ROWS,), generator=generator)
    shares, moves = lesson_of(drawn())
    expected = 0.0
    for row in range(ROWS):
        own, share = scores[row].numpy(), shares[row].item()
        mixed = share * own + (1 - share) * np.roll(own, int(moves[row]))
        answer = model.sum_scores(torch.tensor(mixed)[None].float(), numbers[row : row + 1])
        expected += F.cross_entropy(answer, torch.tensor([mixed.argmax() + numbers[row].item()])).item()
    found = adder_loss(model, scores, numbers, shares, moves)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_only_the_sum_head_learns_from_the_lesson(model: TwoHeadCNN) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    torch.autograd.backward(adder_loss(model, model.digit_scores(images), numbers, *lesson_of(drawn())))
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_reported_is_the_loss_of_both_heads_alone(model: TwoHeadCNN, smoothing: float) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    digits = torch.arange(ROWS) // 5
    draws = drawn()
    loss, reported = Objective(model, smoothing, 0.5)(images, numbers, digits, draws)
    digit_scores, sum_scores = model(images, numbers)
    assert reported.item() == pytest.approx(joint_loss(digit_scores, sum_scores, digits, numbers).item(), rel=1e-5)
    assert not reported.requires_grad
    lesson = adder_loss(model, digit_scores, numbers, *lesson_of(draws))
    both = joint_loss(digit_scores, sum_scores, digits, numbers, smoothing)
    assert loss.item() == pytest.approx((both + 0.5 * lesson).item(), rel=1e-5)
    loss, _ = Objective(model, smoothing, 0.5)(images, numbers, digits, drawn(lesson=False))
    assert loss.item() == pytest.approx(both.item(), rel=1e-5)
