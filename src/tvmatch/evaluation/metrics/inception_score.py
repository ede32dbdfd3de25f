"""The Inception Score (Salimans et al., arXiv 1606.03498)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch.errors import InputError


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over the splits."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = 10) -> InceptionScore:
    """exp E_x KL( p(y | x) ‖ p(y) ), p(y) = E_x p(y | x), for consecutive splits of the images.

    The score is between 1 and the number of classes K. As in the original code, the standard deviation over
    splits is that of a population (divided by their number).

    Args:
        logits: (n, K); p(y | x) is their softmax in float64.
        splits: number of splits; split i has the images n i / splits … n (i + 1) / splits.

    Raises:
        InputError: for fewer images than splits, another shape, or a logit that is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise InputError("logits", f"must have shape (n, K ≥ 1), got {tuple(logits.shape)}")
    if not 1 <= splits <= len(logits):
        raise InputError("splits", f"must be within 1 … {len(logits)} images, got {splits}")
    if not logits.isfinite().all():
        raise InputError("logits", "has a non-finite entry")
    scores = []
    for split in range(splits):
        part = logits[split * len(logits) // splits : (split + 1) * len(logits) // splits]
        log_conditional = part.detach().to("cpu", torch.float64).log_softmax(dim=1)
        conditional = log_conditional.exp()
        marginal = conditional.mean(dim=0)
        # Σ_x p(y|x) log p(y) = n p(y) log p(y), so a class of probability 0 adds 0 · log 0 = 0.
        divergence = (conditional * log_conditional).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.clamp(min=0).exp())  # rounding may give −1e-16 for equal images
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
