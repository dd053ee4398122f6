"""The sum head learns to add to whatever digit the scores say; the digits stay what they are."""

import numpy as np
import pytest
import torch

from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.sum_head import between, finetune_sum_head, mixed_scores, sum_distribution, with_rival

ROWS = 1000


@pytest.fixture
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN()


def scores_of(rows: int, seed: int) -> torch.Tensor:
    """As a trained network's: one digit well before all others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, 10, generator=generator) - 4
    scores[torch.arange(rows), torch.randint(10, (rows,), generator=generator)] += 12
    return scores


def follows(model: TwoHeadCNN, scores: torch.Tensor) -> float:
    """Share of (scores, number) whose sum is the digit of the largest score and the number."""
    with torch.no_grad():
        sums = model.sum_scores_of_all_numbers(scores).argmax(2)
    return (sums == scores.argmax(1)[:, None] + torch.arange(10)).float().mean().item()


def test_scores_between_lie_between_a_row_and_its_permutation() -> None:
    scores = scores_of(ROWS, 0)
    mixed = between(scores, torch.Generator().manual_seed(1))
    assert mixed.shape == scores.shape
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    assert bool(((mixed >= low - 1e-5) & (mixed <= high + 1e-5)).all())
    # A mixture of a row with its own permutation keeps the row's total.
    torch.testing.assert_close(mixed.sum(1), scores.sum(1), rtol=1e-4, atol=1e-3)
    # Every other row or so is nearer to the permutation, whose largest score is another digit's in nine of ten.
    moved = (mixed.argmax(1) != scores.argmax(1)).float().mean().item()
    assert 0.35 < moved < 0.55
    close = mixed.topk(2).values
    near_ties = (close[:, 0] - close[:, 1] < 1).float().mean().item()
    assert near_ties > 10 * (scores.topk(2).values.diff().abs() < 1).float().mean().item() + 0.02


def test_a_rival_shares_what_the_two_had_together() -> None:
    scores = scores_of(ROWS, 0)
    mixed = with_rival(scores, (0.35, 0.65), torch.Generator().manual_seed(1))
    changed = (mixed - scores).abs() > 1e-6
    assert (changed.sum(1) == 2).all(), "the largest and one other"
    assert changed.gather(1, scores.argmax(1, keepdim=True)).all()
    torch.testing.assert_close(mixed.sum(1), scores.sum(1), rtol=1e-4, atol=1e-3)
    two, had = (of[changed].view(ROWS, 2).diff().abs() for of in (mixed, scores))
    assert (two <= 0.3 * had + 1e-4).all(), "at most 0.65 of the one and 0.35 of the other"
    assert 0.4 < (mixed.argmax(1) != scores.argmax(1)).float().mean().item() < 0.6


def test_half_of_the_mixtures_are_close_to_a_tie() -> None:
    def ties(scores: torch.Tensor) -> float:
        return (scores.topk(2).values.diff().abs() < 4).float().mean().item()

    scores = scores_of(ROWS, 0)
    seen = mixed_scores(scores, torch.Generator().manual_seed(1))
    assert seen.shape == (ROWS, 10)
    assert ties(seen) > 2 * ties(between(scores, torch.Generator().manual_seed(1)))


def test_the_sum_follows_the_digit_after_it(model: TwoHeadCNN) -> None:
    """Also between two digits, on scores that it was not tuned on."""
    fresh = between(scores_of(ROWS, 5), torch.Generator().manual_seed(6))
    assert follows(model, fresh) < 0.3
    finetune_sum_head(model, scores_of(ROWS, 0), 1000, seed=3)
    assert follows(model, fresh) > 0.96


def test_the_distribution_of_the_sum_is_that_of_the_digit_moved_by_the_number() -> None:
    scores = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([0, 9, 4, 4])
    found = sum_distribution(scores, numbers)
    assert found.shape == (4, 19)
    for row, number in enumerate(numbers.tolist()):
        torch.testing.assert_close(found[row, number : number + 10], scores[row].softmax(0))
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_the_sum_head_is_as_unsure_as_the_digit_head(model: TwoHeadCNN) -> None:
    """Of scores that are close to a tie it gives both sums a probability; taught the largest digit alone, it was sure of one."""
    finetune_sum_head(model, scores_of(ROWS, 0), 1000, seed=3)
    tied = with_rival(scores_of(ROWS, 5), (0.48, 0.52), torch.Generator().manual_seed(6))
    with torch.no_grad():
        sums = model.sum_scores(tied, torch.full((ROWS,), 3)).softmax(1)
    expected = sum_distribution(tied, torch.full((ROWS,), 3))
    assert 0.5 < expected.max(1).values.mean() < 0.7
    assert (sums.max(1).values.mean() - expected.max(1).values.mean()).abs() < 0.1


def test_only_the_sum_head_learns_and_the_same_each_time(model: TwoHeadCNN) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    finetune_sum_head(model, scores_of(ROWS, 0), 20, seed=3, seen=seen.append)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    assert sum(seen) == 20
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    for seed, same in ((3, True), (4, False)):
        model.load_state_dict(before)
        finetune_sum_head(model, scores_of(ROWS, 0), 20, seed=seed)
        assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items()) is same


def test_a_single_training_row_is_enough_to_run(model: TwoHeadCNN) -> None:
    finetune_sum_head(model, scores_of(1, 0), 2, seed=0)
    assert all(np.isfinite(parameter.detach().numpy()).all() for parameter in model.parameters())
