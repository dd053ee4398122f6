"""Fine-tuning teaches the sum head the distribution of digit + number, and changes nothing else."""

import torch

from mnistsum_ray.model.heads import SUM
from mnistsum_ray.model.network import Network
from mnistsum_ray.model.sum_head import (
    class_distribution,
    finetune_sum_head,
    mix_with_permutation,
    mix_with_swap,
)
from tests.model import new_model

ROWS = 1000


def confident_scores(rows: int, seed: int) -> torch.Tensor:
    """Scores like a trained network's: one digit far above all others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, 10, generator=generator) - 4
    scores[torch.arange(rows), torch.randint(10, (rows,), generator=generator)] += 12
    return scores


def consistency(model: Network, scores: torch.Tensor) -> float:
    """Share of the pairs whose predicted sum is the predicted digit plus the number."""
    with torch.no_grad():
        sums = model.scores_of_all_numbers(scores)[1].argmax(2)
    return (sums == scores.argmax(1)[:, None] + torch.arange(10)).float().mean().item()


def test_finetuning_makes_the_sums_consistent_and_as_unsure_as_the_digits() -> None:
    """On scores between two digits that were not trained on: near a tie, both sums are probable."""
    model = new_model()
    unseen = mix_with_permutation(confident_scores(ROWS, 5), torch.Generator().manual_seed(6))
    tied = mix_with_swap(confident_scores(ROWS, 5), (0.48, 0.52), torch.Generator().manual_seed(6))
    assert consistency(model, unseen) < 0.3
    finetune_sum_head(model, confident_scores(ROWS, 0), 1000, seed=3)
    assert consistency(model, unseen) > 0.96
    before = new_model().state_dict()
    changed = {name for name, value in model.named_parameters() if (value != before[name]).any()}
    assert changed == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    with torch.no_grad():
        sums = model.scores(tied, torch.full((ROWS,), 3))[1].softmax(1)
    expected = class_distribution(SUM, tied, torch.full((ROWS,), 3))
    assert 0.5 < expected.max(1).values.mean() < 0.7
    assert (sums.max(1).values.mean() - expected.max(1).values.mean()).abs() < 0.1
