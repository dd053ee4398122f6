"""What training minimizes: the loss of both heads, and dropout. Nothing of Ray."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.model.network import TwoHeadCNN


def dropout_factors(rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """Dropout (Srivastava et al. 2014) of what conv7 reads: float32[rows, 128, 3, 3], each 0 or 1 / (1 - probability).

    Channels last, as what they are for. Drawn outside of the network, so that the draws are the caller's to repeat.
    """
    draws = torch.rand(rows, 3, 3, 128, generator=generator, device=generator.device)
    return ((draws >= probability) / (1 - probability)).permute(0, 3, 1, 2)


class Objective(nn.Module):
    """The network and its loss as one module, so that DDP and a compiler see all of a step."""

    def __init__(self, model: TwoHeadCNN, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, numbers: Tensor, digits: Tensor, dropout: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two scalars, added up over the rows, of prepared images float32[n, 1, 28, 28] and numbers and digits int64[n].

        Args:
            images: as of `prepare_images`, distorted or not.
            numbers: 0..9.
            digits: the true ones.
            dropout: `dropout_factors` of the rows, or None.

        Returns:
            What to minimize, and the mean of both heads' cross-entropies alone, which has no gradient.
        """
        digit_scores = self.model.digit_scores(images, dropout)
        sum_scores = self.model.sum_scores(digit_scores, numbers)
        loss = joint_loss(digit_scores, sum_scores, digits, numbers, self.label_smoothing)
        with torch.no_grad():
            plain = joint_loss(digit_scores, sum_scores, digits, numbers) if self.label_smoothing else loss.detach()
        return loss, plain


def joint_loss(digit_scores: Tensor, sum_scores: Tensor, digits: Tensor, numbers: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean of the two cross-entropies, added up over the rows (not averaged): a scalar, float32.

    With `label_smoothing` the targets of both are mixed with so much of the uniform distribution (Szegedy et al., "Rethinking
    the Inception Architecture", 2016): bounded digit scores generalize better. Both, since the sums are read from the digit
    scores, and with targets of their own unmixed would still ask for larger ones without end.
    Added up, so that workers and batches of unequal size weigh each row alike; the caller divides once.
    """
    digit_loss = F.cross_entropy(digit_scores.float(), digits, reduction="sum", label_smoothing=label_smoothing)
    sum_loss = F.cross_entropy(sum_scores.float(), digits + numbers, reduction="sum", label_smoothing=label_smoothing)
    return (digit_loss + sum_loss) / 2


def probability_losses(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How far the probabilities of scores [n, classes] are from the true classes int64[n], row by row: float32[n] each.

    Returns:
        The negative log-likelihood in nats, and the Brier score: the squared distance between the probabilities and the truth.
    """
    logarithms = scores.log_softmax(1)
    nll = -logarithms.gather(1, labels[:, None]).squeeze(1)
    brier = logarithms.exp().square().sum(1) - 2 * torch.exp(-nll) + 1
    return nll, brier
