"""Fine-tuning of the sum head after the last epoch: it learns the distribution that the digit scores imply.

Given the digit scores and the number, the distribution of the sum follows: that of the digit, moved by the number. But a
trained network gives its training images hardly any scores between two digits, and there the sum head, which has not seen
such scores, finds another digit than the largest score says. Here it sees as many of them as it needs, made of those that
there are. The convolutions stay as they are, and so do the digits.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.sampling import NUMBERS
from mnistsum_ray.model.network import DIGITS, SUMS, TwoHeadCNN

ROWS: Final = 4_096
"""Training rows, at most, whose digit scores are used: 1,000 give the same result."""

_BATCH: Final = 512

_RATE: Final = 0.02
"""AdamW's learning rate at the first step; it falls to 0 along a line. 0.01 and 0.05 leave more sums that are not digit + number.
"""


def finetune_sum_head(
    model: TwoHeadCNN, digit_scores: Tensor, steps: int, seed: int, seen: Callable[[int], None] = lambda _: None
) -> None:
    """Train the sum head alone on the distribution of digit + number that the digit scores imply.

    The targets are distributions and not the largest digit, as in distillation (Hinton et al. 2015): taught the largest digit,
    the head is sure of every sum, also of wrong ones (negative log-likelihood 0.033 nats beside 0.013 this way).

    Args:
        model: on any device; its sum head is trained in place, in float32.
        digit_scores: float32[n, 10] of training rows, on the same device.
        steps: of the optimizer; each sees 512 new mixtures of scores with random numbers.
        seed: decides the mixtures and the numbers.
        seen: called with the number of steps done since the last call.
    """
    device = digit_scores.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.fc1.parameters(), *model.fc2.parameters()], lr=_RATE, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(digit_scores), (_BATCH,), generator=generator, device=device)
        scores = mixed_scores(digit_scores[rows], generator)
        numbers = torch.randint(NUMBERS, (_BATCH,), generator=generator, device=device)
        loss = F.cross_entropy(model.sum_scores(scores, numbers), sum_distribution(scores, numbers))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        seen(1)


def sum_distribution(digit_scores: Tensor, numbers: Tensor) -> Tensor:
    """The distribution of digit + number: digit scores [n, 10] and numbers int64[n] to probabilities [n, 19]."""
    probabilities = digit_scores.softmax(1)
    sums = numbers[:, None] + torch.arange(DIGITS, device=numbers.device)
    return probabilities.new_zeros(len(numbers), SUMS).scatter(1, sums, probabilities)


def mixed_scores(digit_scores: Tensor, generator: torch.Generator) -> Tensor:
    """Scores between two digits, made of each row's: float32[n, 10].

    Half of them lie anywhere between two digits, the other half close to a tie of two and then anywhere on the way to other
    digits. Judged on moved validation rows, whose sum is then half as often another than that of their own digit and the
    number as where all are on the way to other digits.
    """
    half = len(digit_scores) // 2
    tied = between(with_rival(digit_scores[:half], (0.35, 0.65), generator), generator)
    return torch.cat([tied, with_rival(digit_scores[half:], (0.0, 1.0), generator)])


def with_rival(digit_scores: Tensor, shares: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Of each row's scores a point on the way to the same with the largest and one other exchanged: float32[n, 10].

    Args:
        digit_scores: float32[n, 10].
        shares: smallest and largest share that the scores keep; at 0.5 two digits are tied.
        generator: on the same device.
    """
    rows, device = len(digit_scores), digit_scores.device
    digits = digit_scores.argmax(1, keepdim=True)
    others = (digits + torch.randint(1, DIGITS, (rows, 1), generator=generator, device=device)) % DIGITS
    exchanged = digit_scores.scatter(1, digits, digit_scores.gather(1, others)).scatter(1, others, digit_scores.gather(1, digits))
    low, high = shares
    return torch.lerp(exchanged, digit_scores, low + (high - low) * torch.rand(rows, 1, generator=generator, device=device))


def between(digit_scores: Tensor, generator: torch.Generator) -> Tensor:
    """Of each row's scores a point on the way to the same scores given to other digits, anywhere on it: float32[n, 10]."""
    shape, device = digit_scores.shape, digit_scores.device
    shares = torch.rand(shape[0], 1, generator=generator, device=device)
    order = torch.rand(shape[0], DIGITS, generator=generator, device=device).argsort(1)
    return torch.lerp(digit_scores.gather(1, order), digit_scores, shares)
