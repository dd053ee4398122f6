"""Fine-tuning of the heads after the digit's on synthetic digit scores, after the last epoch.

The distribution of the sum is that of the digit, shifted by the number. But the sum head has hardly
seen scores between two digits, and predicts another sum there. Fine-tuning shows it many of them,
mixed from the scores of training rows. The convolutions stay as they are, and so do the digits.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.model.heads import HEADS, Head
from mnistsum_ray.model.network import Network

MAX_ROWS: Final = 1_024
"""Training rows whose digit scores are used; 4,096 give the same result."""

_BATCH: Final = 512

_LEARNING_RATE: Final = 0.02
"""Of AdamW at the first step; it falls linearly to 0. With 0.01 and 0.05 more sums differ."""


def finetune_sum_head(
    model: Network,
    digit_scores: Tensor,
    steps: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Train all heads but the digit's, with `class_distribution` of the digit scores as target.

    The targets are distributions, as in distillation (Hinton et al. 2015). Trained on the most
    likely digit instead, the head is sure of every sum, also of wrong ones (negative log-likelihood
    0.033 nats instead of 0.013). `digit_scores` float32[n, 10] are those of training rows.
    """
    device = digit_scores.device
    generator = torch.Generator(device).manual_seed(seed)
    parameters = model.head_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end_factor=0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(digit_scores), (_BATCH,), generator=generator, device=device)
        scores = mix_scores(digit_scores[rows], generator)
        numbers = torch.randint(NUMBERS, (_BATCH,), generator=generator, device=device)
        _, *heads = model.scores(scores, numbers)
        loss = torch.zeros((), device=device)
        for head, logits in zip(HEADS[1:], heads, strict=True):
            loss = loss + F.cross_entropy(logits, class_distribution(head, scores, numbers))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        on_progress(1)


def class_distribution(head: Head, digit_scores: Tensor, numbers: Tensor) -> Tensor:
    """Distribution [n, classes] of a head's answer, of digit scores [n, 10], numbers int64[n]."""
    probabilities = digit_scores.softmax(1)
    digits = torch.arange(DIGITS, device=numbers.device)
    classes = head.target(digits, numbers[:, None]).expand(probabilities.shape)
    zeros = probabilities.new_zeros(len(numbers), head.classes)
    return zeros.scatter_add(1, classes, probabilities)


def mix_scores(digit_scores: Tensor, generator: torch.Generator) -> Tensor:
    """Synthetic scores between digits, one row made from each: float32[n, 10] to float32[n, 10].

    The first half is brought close to a tie of two digits, then mixed with other digits. The second
    lies anywhere between two digits. If all rows were mixed with other digits, twice as many sums
    would differ from predicted digit + number on shifted validation images.
    """
    half = len(digit_scores) // 2
    ties = mix_with_swap(digit_scores[:half], (0.35, 0.65), generator)
    near_ties = mix_with_permutation(ties, generator)
    return torch.cat([near_ties, mix_with_swap(digit_scores[half:], (0.0, 1.0), generator)])


def mix_with_swap(
    digit_scores: Tensor, weights: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Mix each row with a copy in which its largest score and a random other are swapped.

    The weight of the row itself is drawn from `weights`; at 0.5 the two digits are tied.
    """
    rows, device = len(digit_scores), digit_scores.device
    digits = digit_scores.argmax(1, keepdim=True)
    distance = torch.randint(1, DIGITS, (rows, 1), generator=generator, device=device)
    others = (digits + distance) % DIGITS
    swapped = digit_scores.scatter(1, digits, digit_scores.gather(1, others))
    swapped = swapped.scatter(1, others, digit_scores.gather(1, digits))
    low, high = weights
    share = low + (high - low) * torch.rand(rows, 1, generator=generator, device=device)
    return torch.lerp(swapped, digit_scores, share)


def mix_with_permutation(digit_scores: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each row, with a random weight, with a random permutation of its scores."""
    shape, device = digit_scores.shape, digit_scores.device
    weights = torch.rand(shape[0], 1, generator=generator, device=device)
    permutations = torch.rand(shape[0], DIGITS, generator=generator, device=device).argsort(1)
    return torch.lerp(digit_scores.gather(1, permutations), digit_scores, weights)
