"""Where a loss or a gradient stopped being finite: the term, the bin of its time, the parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.objectives import Inputs, Loss

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


class _Term(NamedTuple):
    """A term of the loss, and the times (B,) that its values belong to."""

    name: str
    time: str
    times: Tensor

    def where(self, index: int) -> str:
        """The term in a bin of its time."""
        symbol = self.time.replace("_prime", "'")
        return f"{self.name} term with {symbol} in {time_bin(index / TIME_BINS)}"


def describe(
    step: int,
    inputs: Inputs,
    loss: Loss,
    term_times: Mapping[str, str],
    network: nn.Module,
    loss_of_rows: Callable[[Tensor], Loss],
    *,
    rows_at_once: int,
) -> str:
    """One line on what broke in a step whose loss or gradient is not finite.

    Args:
        step: its number, from 1 as in the log.
        inputs: of its loss.
        loss: its loss, with its terms per sample (B,).
        term_times: for each term the name of the time it belongs to.
        network: the network, with the step's gradients.
        loss_of_rows: computes the loss again, for some rows of the batch, int64 (n,).
        rows_at_once: how many of them fit into memory.
    """
    terms = [_Term(name, time, inputs.times[time]) for name, time in term_times.items()]
    found = _broken_data(inputs.x0) or _broken_terms(loss, terms)
    if found is None and not torch.isfinite(loss.loss):
        found = "the loss, of which every term is finite"
    found = found or _broken_gradient(terms, network, loss_of_rows, rows_at_once)
    return f"step {step}: not finite: {found}"


def _broken_data(x0: Tensor) -> str | None:
    bad = ~torch.isfinite(x0).flatten(1).all(1)
    return f"the data of {int(bad.sum())} of {len(x0)} samples" if bad.any() else None


def _broken_terms(loss: Loss, terms: list[_Term]) -> str | None:
    found = []
    for name, time, times in terms:
        bad = ~torch.isfinite(loss.terms[name])
        if bad.any():
            bins = " and ".join(sorted({time_bin(value) for value in times[bad].tolist()}))
            symbol = time.replace("_prime", "'")
            found.append(f"the {name} term of {int(bad.sum())} samples with {symbol} in {bins}")
    return "; ".join(found) or None


def _broken_gradient(
    terms: list[_Term], network: nn.Module, loss_of_rows: Callable[[Tensor], Loss], rows_at_once: int
) -> str:
    """All terms are finite: look for the term and bin whose own gradient is not.

    The loss is computed again for each bin alone, since 0 · ∞ of the other rows is not a number either.
    """
    parameters = dict(network.named_parameters())
    broken = [name for name, parameter in parameters.items() if not _is_finite(parameter.grad)]
    if not broken:
        return _overflow(terms, list(parameters.values()), loss_of_rows, rows_at_once)
    found: list[str] = []
    for term in terms:
        bins = bin_of(term.times)
        for index in range(TIME_BINS):
            for rows in torch.nonzero(bins == index).flatten().split(rows_at_once):
                mean = loss_of_rows(rows).terms[term.name].mean()
                gradients = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
                if not all(_is_finite(gradient) for gradient in gradients):
                    found.append(f"of the {term.where(index)}")
                    break
    return (
        f"the gradient {' and '.join(found) or 'of the whole batch'}, in {len(broken)} parameters, "
        f"first {', '.join(broken[:3])} ({_all(terms)} finite)"
    )


def _overflow(
    terms: list[_Term],
    parameters: list[nn.Parameter],
    loss_of_rows: Callable[[Tensor], Loss],
    rows_at_once: int,
) -> str:
    """Every gradient is finite, but the sum of their squares is not: name the term and bin of the largest.

    A bin's gradient is its part of the batch's, and its norm is taken in float64, where it does not overflow.
    """
    norms: dict[str, float] = {}
    for term in terms:
        bins = bin_of(term.times)
        for index in bins.unique().tolist():
            total = [torch.zeros_like(x, dtype=torch.float64) for x in parameters]
            for rows in torch.nonzero(bins == index).flatten().split(rows_at_once):
                share = loss_of_rows(rows).terms[term.name].sum() / len(bins)
                gradients = torch.autograd.grad(share, parameters, allow_unused=True)
                for sum_, gradient in zip(total, gradients, strict=True):
                    if gradient is not None:
                        sum_ += gradient
            norms[f"the {term.where(index)}"] = nn.utils.get_total_norm(total).item()
    largest = max(norms, key=lambda where: norms[where])
    return (
        f"the norm of the gradient overflows, which is largest of {largest}, {norms[largest]:.3g} "
        f"({_all(terms)} finite, and so is the gradient itself)"
    )


def _all(terms: list[_Term]) -> str:
    return "the loss is" if len(terms) == 1 else "both terms are" if len(terms) == 2 else "all terms are"


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())
