"""The ways to compute attention and its tangent that `attention.py` compares, and their float64 reference.

Shapes: B batch, H heads, N queries and keys, D head width; every tensor is (B, H, N, D).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvmatch.attention import attention, attention_reference
from tvmatch.dual import Dual

Shape = tuple[int, int, int, int]
# q, k, v and their tangents in; output and its tangent (where there is one) out.
Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]

# Buffers of N × N that the mathematics needs at once with its backward, in units of the input's size:
# counted on a CPU with a dispatch mode over all allocations of PyTorch 2.13 (9.5 and 18.6).
MATH_BUFFERS = {True: 10, False: 20}


class Contender(NamedTuple):
    """One way to compute attention.

    Attributes:
        name: in the tables.
        function: see `Function`.
        tangent: whether the function also returns the tangent.
        backward: whether reverse mode goes through it.
        half_reductions: whether PyTorch's math attention may keep half precision in half precision; as
            shipped, it computes them in float32.
        square_buffers: N × N buffers in memory, see MATH_BUFFERS; 0 for methods in linear memory.
    """

    name: str
    function: Function
    tangent: bool = True
    backward: bool = True
    half_reductions: bool = False
    square_buffers: int = 0

    def forward_flops(self, shape: Shape) -> int:
        """12 N² D for each head with the tangent (six products), 4 N² D without (two)."""
        batch, heads, length, width = shape
        return (12 if self.tangent else 4) * batch * heads * length**2 * width

    def backward_flops(self, shape: Shape) -> int:
        """30 N² D for each head with the tangent, 10 N² D without, S recomputed: 2.5 times the forward."""
        return self.forward_flops(shape) * 5 // 2


OURS, VALUE_ONLY, FLASH = "tvmatch", "tvmatch, value only", "flash SDPA, value only"
MATH = "math SDPA, jvp"


def contenders(backend: str, quick: bool, device: torch.device) -> list[Contender | str]:
    """What can run here; a string says why one cannot.

    Args:
        backend: of `tvmatch.attention.attention`.
        quick: leave out the two slowest, which are never the fastest.
        device: flash attention is the GPU's yardstick.
    """

    def ours(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, q_tangent, k_tangent, v_tangent = x
        output = attention(Dual(q, q_tangent), Dual(k, k_tangent), Dual(v, v_tangent), backend=backend)
        assert output.tangent is not None
        return output.value, output.tangent

    # "auto" would hand an attention without tangents to PyTorch's own.
    plain = "triton" if backend == "auto" and device.type == "cuda" else backend

    def value_only(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (attention(*x[:3], backend=plain),)

    compiled = torch.compile(math_jvp, fullgraph=True, dynamic=False)
    found: list[Contender | str] = [
        Contender(OURS, ours),
        Contender(VALUE_ONLY, value_only, tangent=False),
        Contender(f"{MATH}, eager", math_jvp, half_reductions=True, square_buffers=MATH_BUFFERS[True]),
    ]
    if not quick:
        found += [
            Contender(f"{MATH}, eager, as shipped", math_jvp, square_buffers=MATH_BUFFERS[False]),
            Contender(f"{MATH}, compiled", compiled, half_reductions=True, square_buffers=MATH_BUFFERS[True]),
        ]
    found.append(jvp_flash_attention())
    if device.type == "cuda":
        found.append(Contender(FLASH, flash, tangent=False))
    return found


def math_jvp(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """PyTorch's own attention in plain operations, under its own forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(F.scaled_dot_product_attention, tuple(x[:3]), tuple(x[3:]))
    return value, tangent


def flash(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """PyTorch's flash attention: what a chip reaches without the tangent."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(*x[:3]),)


def jvp_flash_attention() -> Contender | str:
    """The package of that name, called as its documentation says; its backward drops the tangent's part."""
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except Exception as error:  # the package imports much else, which can fail in its own ways
        return f"jvp_flash_attention: {error}"

    def function(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        value, tangent = torch.func.jvp(JVPAttn.fwd_dual, tuple(x[:3]), tuple(x[3:]))
        return value, tangent

    return Contender("jvp_flash_attention", function, backward=False)


# --- the reference -------------------------------------------------------------------------------------

BLOCK_ELEMENTS = 2**24  # of one block's (heads, rows, N) matrices: 128 MiB each in float64


def compared(shape: Shape, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What is compared of a tensor: (1, heads, N, D), of the last sequence as many of the last heads as a
    float64 computation does in a moment, at least one. The last ones, so that offsets are exercised.
    """
    budget = 2**26 if device.type == "cuda" else 2**20
    heads = max(1, min(shape[1], budget // shape[2] ** 2))
    return lambda x: x[-1:, -heads:]


def float64_results(x: Sequence[Tensor], cotangents: Sequence[Tensor], tangent: bool) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, in float64, by blocks of query rows.

    Rows of the output are independent, and the gradients of k and v are sums over them, so memory stays
    linear in N.

    Args:
        x: q, k, v and their tangents, (B, H, N, D).
        cotangents: of the value and the tangent.
        tangent: False leaves the tangents out: one output, three gradients.
    """
    count = 6 if tangent else 3
    leaves = [a.detach().double() for a in x[:count]]
    outputs_of: list[list[Tensor]] = []
    gradients = [torch.zeros_like(a) for a in leaves]
    length = leaves[0].shape[2]
    rows = max(16, min(length, BLOCK_ELEMENTS // (length * leaves[0].shape[1])))
    for start in range(0, length, rows):
        block = slice(start, start + rows)
        parts = [a[:, :, block] if i % 3 == 0 else a for i, a in enumerate(leaves)]
        parts = [a.clone().requires_grad_() for a in parts]
        duals = [Dual(parts[i], parts[i + 3] if tangent else None) for i in range(3)]
        output = attention_reference(*duals)
        outputs = [a for a in output if a is not None]
        given = [a[:, :, block].double() for a in cotangents[: len(outputs)]]
        for i, part in enumerate(torch.autograd.grad(outputs, parts, given)):
            (gradients[i][:, :, block] if i % 3 == 0 else gradients[i]).add_(part)
        outputs_of.append([a.detach() for a in outputs])
    return [torch.cat(parts, 2) for parts in zip(*outputs_of, strict=True)] + gradients


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite where anything is not finite, or nothing is expected."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf
