"""Find where a loss or gradient is not finite: the term, the bin of its time, the parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.objectives import Inputs, Loss

TIME_BINS = 4


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the message names step, time bin and term."""


def time_bin(time: float) -> str:
    """The name of the quarter of [0, 1] that contains a time, such as 0.25–0.50."""
    index = min(int(time * TIME_BINS), TIME_BINS - 1)
    return f"{index / TIME_BINS:.2f}–{(index + 1) / TIME_BINS:.2f}"


def bin_of(times: Tensor) -> Tensor:
    """The bin 0 … TIME_BINS − 1 of each time, int64 of the same shape."""
    return (times * TIME_BINS).long().clamp(max=TIME_BINS - 1)


class _Term(NamedTuple):
    """A term of the loss, with the symbol and the values (B,) of its time."""

    name: str
    symbol: str
    times: Tensor


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
    """Describe in one line what is not finite in a step: data, terms of the loss, or its gradient.

    Args:
        step: number of the step, from 1 as in the log.
        inputs: of the loss.
        loss: the loss, with its terms per sample (B,).
        term_times: name of the time of each term.
        network: the network, with the gradients of the step.
        loss_of_rows: recomputes the loss for some rows of the batch, int64 (n,).
        rows_at_once: number of rows that fit into memory.
    """
    terms = [
        _Term(name, time.replace("_prime", "'"), inputs.times[time]) for name, time in term_times.items()
    ]
    found = _non_finite_data(inputs.x0) or _non_finite_terms(loss, terms)
    if found is None and not torch.isfinite(loss.loss):
        found = "the loss, of which every term is finite"
    found = found or _non_finite_gradient(terms, network, loss_of_rows, rows_at_once)
    return f"step {step}: not finite: {found}"


def _non_finite_data(x0: Tensor) -> str | None:
    bad = ~torch.isfinite(x0).flatten(1).all(1)
    return f"the data of {int(bad.sum())} of {len(x0)} samples" if bad.any() else None


def _non_finite_terms(loss: Loss, terms: list[_Term]) -> str | None:
    found = []
    for name, symbol, times in terms:
        bad = ~torch.isfinite(loss.terms[name])
        if bad.any():
            bins = " and ".join(sorted({time_bin(value) for value in times[bad].tolist()}))
            found.append(f"the {name} term of {int(bad.sum())} samples with {symbol} in {bins}")
    return "; ".join(found) or None


def _non_finite_gradient(
    terms: list[_Term], network: nn.Module, loss_of_rows: Callable[[Tensor], Loss], rows_at_once: int
) -> str:
    """Find the terms and bins whose own gradient is not finite, if all terms are finite.

    The loss is recomputed for each bin separately: with all rows together, 0 · ∞ of other rows would be NaN.
    """
    finite = "the loss is" if len(terms) == 1 else "both terms are" if len(terms) == 2 else "all terms are"
    parameters = dict(network.named_parameters())
    bad = [name for name, parameter in parameters.items() if not _is_finite(parameter.grad)]
    if not bad:
        return f"the norm of the gradient overflows ({finite} finite, and so is the gradient itself)"
    found: list[str] = []
    for name, symbol, times in terms:
        bins = bin_of(times)
        for index in range(TIME_BINS):
            for rows in torch.nonzero(bins == index).flatten().split(rows_at_once):
                mean = loss_of_rows(rows).terms[name].mean()
                gradients = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
                if not all(_is_finite(gradient) for gradient in gradients):
                    found.append(f"of the {name} term with {symbol} in {time_bin(index / TIME_BINS)}")
                    break
    return (
        f"the gradient {' and '.join(found) or 'of the whole batch'}, in {len(bad)} parameters, "
        f"first {', '.join(bad[:3])} ({finite} finite)"
    )


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())
