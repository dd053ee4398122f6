"""Loss of both heads, and dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.model.network import TwoHeadCNN


def dropout_factors(rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw the dropout factors (Srivastava et al. 2014) of conv7's input, on the generator's device.

    They are drawn outside the network, so that the caller can seed each step's draws.

    Returns:
        float32[rows, 128, 3, 3], channels last as conv7's input; each value is 0 or 1 / (1 - probability).
    """
    draws = torch.rand(rows, 3, 3, 128, generator=generator, device=generator.device)
    return ((draws >= probability) / (1 - probability)).permute(0, 3, 1, 2)


class Objective(nn.Module):
    """The network and its loss as one module, so that DDP and the compiler see the whole step."""

    def __init__(self, model: TwoHeadCNN, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, numbers: Tensor, digits: Tensor, dropout: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the loss of n rows.

        Args:
            images: prepared images float32[n, 1, 28, 28], distorted or not.
            numbers: int64[n] in 0..9.
            digits: true digits int64[n].
            dropout: `dropout_factors` of the rows, or None.

        Returns:
            The loss to minimize, and the loss without label smoothing, which has no gradient: scalars, summed over the rows.
        """
        digit_scores = self.model.digit_scores(images, dropout)
        sum_scores = self.model.sum_scores(digit_scores, numbers)
        loss = joint_loss(digit_scores, sum_scores, digits, numbers, self.label_smoothing)
        with torch.no_grad():
            unsmoothed = joint_loss(digit_scores, sum_scores, digits, numbers) if self.label_smoothing else loss.detach()
        return loss, unsmoothed


def joint_loss(digit_scores: Tensor, sum_scores: Tensor, digits: Tensor, numbers: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the two heads' cross-entropies, summed over the rows: a float32 scalar.

    The sum, not the mean, over the rows gives each row the same weight in workers and batches of unequal size; the caller divides
    once.

    `label_smoothing` is the share of the uniform distribution in the targets of both heads (Szegedy et al., "Rethinking the
    Inception Architecture", 2016): bounded digit scores generalize better. Both heads, because the sum head reads the digit
    scores; with unsmoothed sums its loss would still push them up without bound.
    """
    digit_loss = F.cross_entropy(digit_scores.float(), digits, reduction="sum", label_smoothing=label_smoothing)
    sum_loss = F.cross_entropy(sum_scores.float(), digits + numbers, reduction="sum", label_smoothing=label_smoothing)
    return (digit_loss + sum_loss) / 2


def probability_losses(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of each row's probabilities.

    Args:
        scores: logits [n, classes].
        labels: true classes int64[n].

    Returns:
        Negative log-likelihoods in nats and Brier scores (squared distances between the probabilities and the one-hot truth),
        float32[n] each.
    """
    log_probabilities = scores.log_softmax(1)
    nll = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    brier = log_probabilities.exp().square().sum(1) - 2 * torch.exp(-nll) + 1
    return nll, brier
