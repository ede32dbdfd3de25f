"""Where a loss or a gradient stopped being finite: the term, the bin of its time, the parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tvmatch.objectives import TVMLoss
from tvmatch.times import Times

TIME_BINS = 4


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the message names the step, the time bin and the term."""


def time_bin(time: float) -> str:
    """The name of the quarter of [0, 1] that a time lies in, such as 0.25–0.50."""
    index = min(int(time * TIME_BINS), TIME_BINS - 1)
    return f"{index / TIME_BINS:.2f}–{(index + 1) / TIME_BINS:.2f}"


def bin_of(times: Tensor) -> Tensor:
    """The number 0 … TIME_BINS − 1 of each time's bin, int64 of the same shape."""
    return (times * TIME_BINS).long().clamp(max=TIME_BINS - 1)


def describe(
    step: int,
    x0: Tensor,
    loss: TVMLoss,
    times: Times,
    network: nn.Module,
    loss_of_rows: Callable[[Tensor], TVMLoss],
    *,
    rows_at_once: int,
) -> str:
    """One line on what broke in a step whose loss or gradient is not finite.

    Args:
        step: its number, from 1 as in the log.
        x0: its data (B, ...).
        loss: its loss, with both terms per sample (B,).
        times: its times, each (B,).
        network: the network, with the step's gradients.
        loss_of_rows: computes the loss again, for some rows of the batch, int64 (n,).
        rows_at_once: how many of them fit into memory.
    """
    found = _broken_data(x0) or _broken_terms(loss, times)
    found = found or _broken_gradient(times, network, loss_of_rows, rows_at_once)
    return f"step {step}: not finite: {found}"


def _broken_data(x0: Tensor) -> str | None:
    bad = ~torch.isfinite(x0).flatten(1).all(1)
    return f"the data of {int(bad.sum())} of {len(x0)} samples" if bad.any() else None


def _broken_terms(loss: TVMLoss, times: Times) -> str | None:
    found = []
    for (name, symbol, term_times), values in zip(_TERMS, loss[1:], strict=True):
        bad = ~torch.isfinite(values)
        if bad.any():
            bins = sorted({time_bin(time) for time in term_times(times)[bad].tolist()})
            found.append(f"the {name} of {int(bad.sum())} samples with {symbol} in {' and '.join(bins)}")
    return "; ".join(found) or None


def _broken_gradient(
    times: Times, network: nn.Module, loss_of_rows: Callable[[Tensor], TVMLoss], rows_at_once: int
) -> str:
    """Both terms are finite: look for the term and bin whose own gradient is not.

    The loss is computed again for each bin alone, since 0 · ∞ of the other rows is not a number either.
    """
    parameters = dict(network.named_parameters())
    broken = [name for name, parameter in parameters.items() if not _is_finite(parameter.grad)]
    if not broken:
        return _overflow(times, list(parameters.values()), loss_of_rows, rows_at_once)
    found: list[str] = []
    for position, (name, symbol, term_times) in enumerate(_TERMS):
        bins = bin_of(term_times(times))
        for index in range(TIME_BINS):
            for rows in torch.nonzero(bins == index).flatten().split(rows_at_once):
                terms = loss_of_rows(rows)[1:]
                gradients = torch.autograd.grad(
                    terms[position].mean(), list(parameters.values()), allow_unused=True
                )
                if not all(_is_finite(gradient) for gradient in gradients):
                    found.append(f"of the {name} with {symbol} in {time_bin(index / TIME_BINS)}")
                    break
    return (
        f"the gradient {' and '.join(found) or 'of the whole batch'}, in {len(broken)} parameters, "
        f"first {', '.join(broken[:3])} (both terms are finite)"
    )


def _overflow(
    times: Times,
    parameters: list[nn.Parameter],
    loss_of_rows: Callable[[Tensor], TVMLoss],
    rows_at_once: int,
) -> str:
    """Every gradient is finite, but the sum of their squares is not: name the term and bin of the largest.

    A bin's gradient is its part of the batch's, and its norm is taken in float64, where it does not overflow.
    """
    norms: dict[str, float] = {}
    for position, (name, symbol, term_times) in enumerate(_TERMS):
        bins = bin_of(term_times(times))
        for index in bins.unique().tolist():
            total = [torch.zeros_like(x, dtype=torch.float64) for x in parameters]
            for rows in torch.nonzero(bins == index).flatten().split(rows_at_once):
                share = loss_of_rows(rows)[1:][position].sum() / len(bins)
                gradients = torch.autograd.grad(share, parameters, allow_unused=True)
                for sum_, gradient in zip(total, gradients, strict=True):
                    if gradient is not None:
                        sum_ += gradient
            norm = nn.utils.get_total_norm(total).item()
            norms[f"the {name} with {symbol} in {time_bin(index / TIME_BINS)}"] = norm
    largest = max(norms, key=lambda where: norms[where])
    return (
        f"the norm of the gradient overflows, which is largest of {largest}, {norms[largest]:.3g} "
        "(both terms and the gradient itself are finite)"
    )


# Name, symbol of its time, and its times, in the order of TVMLoss.
_TERMS: tuple[tuple[str, str, Callable[[Times], Tensor]], ...] = (
    ("terminal term", "t", lambda times: times.t),
    ("flow term", "s'", lambda times: times.s_prime),
)


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())
