"""A lesson in arithmetic for the sum head, once the network is trained. Nothing of Ray.

Given the digit scores and the number, the sum is arithmetic. But a trained network gives its training images hardly any scores
that lie between two digits, and there the sum head, which has not seen such, finds another digit than the largest score says.
Here it sees as many as it takes, made of those that there are. The convolutions stay as they are, and so do the digits.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.model import DIGITS, TwoHeadCNN
from mnistsum_ray.pairs import NUMBERS

ROWS: Final = 4_096
"""Training rows, at most, whose digit scores it is made of: with 1,000 it comes to the same."""

_BATCH: Final = 512

_RATE: Final = 0.01
"""AdamW's learning rate at the first step; it falls to 0 along a line."""


def teach(model: TwoHeadCNN, digit_scores: Tensor, steps: int, seed: int, seen: Callable[[int], None] = lambda _: None) -> None:
    """Train the sum head alone to add the number to the digit of the largest score.

    Args:
        model: on any device; its sum head is trained in place, in float32.
        digit_scores: float32[n, 10] of training rows, on the same device.
        steps: of the optimizer; each sees 512 scores and numbers that none has seen before.
        seed: decides what they see.
        seen: is told of so many more steps.
    """
    device = digit_scores.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.fc1.parameters(), *model.fc2.parameters()], lr=_RATE, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(digit_scores), (_BATCH,), generator=generator, device=device)
        scores = to_add_to(digit_scores[rows], generator)
        numbers = torch.randint(NUMBERS, (_BATCH,), generator=generator, device=device)
        loss = F.cross_entropy(model.sum_scores(scores, numbers), scores.argmax(1) + numbers)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        seen(1)


def to_add_to(digit_scores: Tensor, generator: torch.Generator) -> Tensor:
    """Scores between two digits, made of each row's: float32[n, 10].

    Half of them are anywhere between two digits, the other half close to a tie of two and then anywhere on the way to other
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
