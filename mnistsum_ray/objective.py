"""What training minimizes: the loss of both heads, a lesson in arithmetic for the sum head, dropout. Nothing of Ray."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.model import DIGITS, TwoHeadCNN, joint_loss
from mnistsum_ray.pairs import Draw, step_seed


class Draws(NamedTuple):
    """What is drawn for the rows of a step, beside their numbers and distortions."""

    lesson: tuple[Tensor, Tensor] | None
    """float32[n] in 0..1 and int64[n] in 1..9, see `adder_loss`; None without a lesson."""
    dropout: Tensor | None
    """`dropout_factors` of the rows, or None without dropout."""


def draw(seed: int, epoch: int, step: int, rows: int, *, lesson: bool, dropout: float, device: torch.device) -> Draws:
    """What is drawn for the `rows` of a global batch: the same for any number of workers, on devices of a kind."""

    def generator(purpose: Draw) -> torch.Generator:
        return torch.Generator(device).manual_seed(step_seed(seed, epoch, step, purpose))

    drawn = None
    if lesson:
        for_lesson = generator(Draw.LESSON)
        shares = torch.rand(rows, generator=for_lesson, device=device)
        drawn = shares, torch.randint(1, DIGITS, (rows,), generator=for_lesson, device=device)
    return Draws(drawn, dropout_factors(rows, dropout, generator(Draw.DROPOUT)) if dropout else None)


def share_of(draws: Draws, rank: int, world_size: int) -> Draws:
    """One worker's, of those of the global batch; see `pairs.rank_share`."""
    mine = slice(rank, None, world_size)
    lesson = None if draws.lesson is None else (draws.lesson[0][mine], draws.lesson[1][mine])
    return Draws(lesson, None if draws.dropout is None else draws.dropout[mine])


def dropout_factors(rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """Dropout (Srivastava et al. 2014) of what conv7 reads: float32[rows, 128, 3, 3], each 0 or 1 / (1 - probability).

    Channels last, as what they are for. Drawn outside of the network, so that the draws are the caller's to repeat.
    """
    draws = torch.rand(rows, 3, 3, 128, generator=generator, device=generator.device)
    return ((draws >= probability) / (1 - probability)).permute(0, 3, 1, 2)


def adder_loss(model: TwoHeadCNN, digit_scores: Tensor, numbers: Tensor, shares: Tensor, moves: Tensor) -> Tensor:
    """A lesson in arithmetic: cross-entropy, added up over the rows, of the sum that the digit scores themselves imply.

    Given the digit scores and the number, the sum is arithmetic. But among the training images hardly any lie between two
    digits, and without those the sum head finds the likelier digit otherwise than the largest score does. So the scores of
    every row are mixed with the same scores moved on to another digit. Only the sum head learns from it.

    Args:
        model: whose sum head learns.
        digit_scores: float[n, 10], of which no gradient is taken.
        numbers: int64[n] in 0..9.
        shares: float32[n] in 0..1, of the scores as they are.
        moves: int64[n] in 1..9, by how many digits the others are moved.
    """
    given = digit_scores.detach().float()
    moved = given.gather(1, (torch.arange(DIGITS, device=given.device) - moves[:, None]) % DIGITS)
    mixed = torch.lerp(moved, given, shares[:, None])
    return F.cross_entropy(model.sum_scores(mixed, numbers).float(), mixed.argmax(1) + numbers, reduction="sum")


class Objective(nn.Module):
    """The network and its loss as one module, so that DDP and a compiler see all of a step."""

    def __init__(self, model: TwoHeadCNN, label_smoothing: float, lesson: float) -> None:
        """`lesson` is how much it counts, beside the loss of both heads."""
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.lesson = lesson

    def forward(self, images: Tensor, numbers: Tensor, digits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Prepared images float32[n, 1, 28, 28], numbers and digits int64[n] to two scalars, added up over the rows.

        Returns:
            What to minimize, and the mean of both heads' cross-entropies alone, which has no gradient.
        """
        digit_scores = self.model.digit_scores(images, draws.dropout)
        sum_scores = self.model.sum_scores(digit_scores, numbers)
        loss = joint_loss(digit_scores, sum_scores, digits, numbers, self.label_smoothing)
        with torch.no_grad():
            plain = joint_loss(digit_scores, sum_scores, digits, numbers) if self.label_smoothing else loss.detach()
        if draws.lesson is not None:
            loss = loss + self.lesson * adder_loss(self.model, digit_scores, numbers, *draws.lesson)
        return loss, plain
