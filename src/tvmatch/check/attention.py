"""Compare attention with PyTorch's forward mode in float64 on the CPU.

Shapes: B batch, H heads, N queries, M keys, D head width.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.attention import attention
from tvmatch.check.comparison import EXACT, Comparison, Setting, failure, perturbed, relative_error, tolerance
from tvmatch.dual import Dual
from tvmatch.models.base import answers_of
from tvmatch.seeds import generator

HEADS = 2


class Case(NamedTuple):
    """One attention.

    Attributes:
        name: name in the report.
        queries: N.
        keys: M.
        head_dim: D.
        tangents: the inputs among q, k and v that have a tangent.
        causal: query i attends only to keys j ≤ i.
        key_lengths: number of keys of each sample; None: all M.
        forward_mode: use plain tensors inside `torch.func.jvp` instead of Duals.
    """

    name: str
    queries: int
    keys: int
    head_dim: int
    tangents: str = "qkv"
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    forward_mode: bool = False


# Lengths below and above one tile of the kernels, and multiples of a tile or not.
CASES = (
    Case("self-attention", 64, 64, 64),
    Case("cross-attention, ragged", 37, 150, 64),
    Case("head width 72", 70, 70, 72),
    Case("causal", 80, 50, 64, causal=True),
    Case("key lengths, one of them 0", 40, 70, 64, key_lengths=(0, 41)),
    Case("tangents of q and k", 33, 40, 64, tangents="qk"),
    Case("tangent of v", 33, 40, 64, tangents="v"),
    Case("under torch.func.jvp", 33, 40, 64, forward_mode=True),
    Case("no tangent", 33, 40, 64, tangents=""),
)


class Problem(NamedTuple):
    """The tensors of a case.

    Attributes:
        inputs: q, k and v, followed by their tangents, if any.
        cotangents: G of the value and, if there is a tangent, Ġ; of the value's shape.
    """

    inputs: list[Tensor]
    cotangents: list[Tensor]


def check_attention(setting: Setting, own: Case | None = None) -> list[Comparison]:
    """Check value, tangent and gradients of all inputs, for a few shapes and all backends of the setting.

    Args:
        setting: device and precision.
        own: an additional case, such as that of a network.
    """
    cases = CASES if own is None else (*CASES, own)
    comparisons = [
        comparison
        for backend in backends(setting)
        for case in cases
        for comparison in compare(case, setting, backend)
    ]
    # Without a tangent, "auto" uses PyTorch's kernels.
    return comparisons + compare(CASES[-1], setting, "pytorch")


def obstacle_to_kernels(setting: Setting) -> str | None:
    """Why the fused kernels do not support the setting; None if they do."""
    from tvmatch.attention.operators import unusable  # imported here because it loads Triton

    obstacle: str | None = unusable(setting.device, setting.dtype)
    return obstacle


def backends(setting: Setting) -> tuple[str, ...]:
    """The backends that support tangents in this setting; the first one is the choice of "auto"."""
    if obstacle_to_kernels(setting) is not None:
        return ("reference",)
    return ("triton",) if setting.device.type == "cuda" else ("reference", "triton")


def compare(case: Case, setting: Setting, backend: str) -> list[Comparison]:
    """One comparison for each of value, tangent and gradients."""
    random = generator(0, "check", case.name)
    problem = _draw(case, setting, random)
    try:
        actual = _answer(case, problem, setting, backend)
    except Exception as error:  # any exception is reported as a failed comparison
        return [failure("attention", case.name, error, backend)]
    exact = _answer(case, problem, EXACT, "exact")
    u = setting.unit_roundoff
    nearby = Problem(*([perturbed(x.double(), u, random) for x in tensors] for tensors in problem))
    changed = _answer(case, nearby, EXACT, "exact")
    return [
        Comparison(
            "attention",
            case.name,
            part,
            relative_error([actual[part]], [exact[part]]) if part in actual else math.nan,
            tolerance(setting, [changed[part]], [exact[part]]),
            backend,
        )
        for part in exact
    ]


def _draw(case: Case, setting: Setting, random: torch.Generator) -> Problem:
    """Draw standard normal tensors, rounded to the setting's dtype, on the CPU."""
    batch = 2 if case.key_lengths is None else len(case.key_lengths)
    lengths = {"q": case.queries, "k": case.keys, "v": case.keys}

    def draw(length: int) -> Tensor:
        return torch.randn(
            batch, HEADS, length, case.head_dim, generator=random, dtype=torch.float32, device="cpu"
        ).to(setting.dtype)

    inputs = [draw(lengths[x]) for x in ("q", "k", "v", *case.tangents)]
    return Problem(inputs, [draw(case.queries) for _ in range(1 + bool(case.tangents))])


def _answer(case: Case, problem: Problem, setting: Setting, backend: str) -> dict[str, Tensor]:
    """Value, tangent and gradients by name, on the CPU."""
    inputs = [x.detach().to(setting.device, setting.dtype).requires_grad_() for x in problem.inputs]
    cotangents = [x.to(setting.device, setting.dtype) for x in problem.cotangents]
    tangents = dict(zip(case.tangents, inputs[3:], strict=True))
    q, k, v = (Dual(x, tangents.get(name)) for name, x in zip("qkv", inputs[:3], strict=True))
    lengths = None if case.key_lengths is None else torch.tensor(case.key_lengths, device=setting.device)
    options: dict[str, Any] = {"causal": case.causal, "key_lengths": lengths}
    if backend == "exact":
        output = exact_attention(q, k, v, **options)
    else:
        options["backend"] = "auto" if backend == "pytorch" else backend
        if case.forward_mode:
            output = Dual(*torch.func.jvp(partial(attention, **options), *zip(q, k, v, strict=True)))
        else:
            output = attention(q, k, v, **options)
    parts = {"value": output.value} | ({} if output.tangent is None else {"tangent": output.tangent})
    # If a tangent is missing or does not depend on the inputs, its gradients are zero.
    given = cotangents[: len(parts)]
    gradients = torch.autograd.grad(list(parts.values()), inputs, given, materialize_grads=True)
    names = [*(f"grad {x}" for x in "qkv"), *(f"grad {x}\u0307" for x in case.tangents)]  # q̇, k̇, v̇
    parts |= dict(zip(names, gradients, strict=True))
    return {name: x.detach().cpu() for name, x in parts.items()}


def exact_attention(q: Dual, k: Dual, v: Dual, *, causal: bool, key_lengths: Tensor | None) -> Dual:
    """softmax(Q Kᵀ / √D) V by the definition, and its tangent by PyTorch's forward mode.

    It shares no formula with `tvmatch.attention`, so an error there is found in every precision.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        causal: query i attends only to keys j ≤ i.
        key_lengths: (B,), or None for M; without keys the value is zero.
    """
    queries, keys = q.value.shape[2], k.value.shape[2]
    kept = torch.ones(len(q.value), 1, queries, keys, dtype=torch.bool, device="cpu")
    if causal:
        kept = kept.tril()
    if key_lengths is not None:
        kept = kept & (torch.arange(keys, device="cpu") < key_lengths[:, None, None, None])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A finite mask value, so that a row without keys contains no NaN before it is set to zero.
        scores = torch.where(kept, q @ k.mT / math.sqrt(q.shape[-1]), -1e30)
        return torch.where(kept, scores.softmax(-1), 0.0) @ v

    values = tuple(x.value for x in (q, k, v))
    if all(x.tangent is None for x in (q, k, v)):
        return Dual(plain(*values))
    tangents = tuple(torch.zeros_like(x.value) if x.tangent is None else x.tangent for x in (q, k, v))
    result = torch.func.jvp(plain, values, tangents)
    return Dual(result[0], result[1])


def own_case(network: nn.Module) -> Case | None:
    """The case of a network's self-attention; None for a network without attention."""
    shape = answers_of(network).attention_shape()
    if shape is None:
        return None
    tokens, head_dim = shape
    return Case(f"the network's own, {tokens} × {head_dim}", tokens, tokens, head_dim)
