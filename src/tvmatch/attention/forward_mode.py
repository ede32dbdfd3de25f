"""Attention on tensors that carry a tangent of PyTorch's forward mode: `torch.func.jvp`, `forward_ad`.

Such a tangent is hidden: code, and the compiler, see a plain tensor. PyTorch's fused attention raises on
it, and an operator registered with `torch.library` drops it without a word. So the tangent is taken out,
attention computes on Duals, with the same kernels as ever, and the result's tangent is put back:

    q, q̇ ← unpack_dual(q)    O, Ȯ ← attention of Duals    make_dual(O, Ȯ)

Reverse mode through the transform then meets one ordinary operator with one joint backward. An
`autograd.Function` with a `jvp` would compute the value twice, its backward apart from the tangent's, and
`torch.compile` drops it.

One level of forward mode alone is taken apart like this. Anything else (`jacfwd`, `hessian`, `grad` of a
jvp, Duals whose parts hide tangents of their own) goes to the plain reference, which PyTorch differentiates
by itself as often as it is asked to.

Under `torch.compile` (seen with PyTorch 2.11 and 2.13): the compiler traces a transform inside the compiled
function correctly, and it compiles anew where a level is open that was not open before; but it sees no
tangent of a level opened *outside* the compiled function, and its code drops it. So the reference is traced
where its tangents can be seen, and everything else is left to eager execution, which is right; with
`fullgraph=True` it is an error.

This module loads the compiler and is therefore imported only where a level is open.
"""

from collections.abc import Callable

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from tvmatch.attention.refusals import hides_tangent
from tvmatch.dual import Dual

# Attention on Duals by the backend of a name.
Attention = Callable[[Dual, Dual, Dual, str], Dual]


def attend(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    """`compute(q, k, v, backend)` with the tangents of the open level of forward mode.

    Args:
        compute: attention on Duals whose parts hide no tangent; on any with the backend "reference".
        q, k, v: parts may hide a tangent.
        backend: see `attention`.

    Returns:
        A Dual whose parts carry the tangents of the open level.

    Raises:
        RuntimeError: under `torch.compile(fullgraph=True)`, save for the reference on tangents that the
            compiled function made itself; for the backend "triton" inside nested transforms.
    """
    if torch.compiler.is_compiling():
        plain = backend == "reference" or (backend == "auto" and q.value.device.type != "cuda")
        if plain and is_single_level() and hides_tangent((q, k, v)):
            return _attend_at_one_level(compute, q, k, v, "reference")
    result: Dual = _attend_eagerly(compute, q, k, v, backend)
    return result


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="tvmatch.attention on plain tensors inside a forward-mode transform (torch.func.jvp, forward_ad): "
    "a compiled graph would drop the tangent. Pass tvmatch.Dual(value, tangent) instead of using the "
    'transform, or call the transform inside the compiled function with backend="reference", or do '
    "without fullgraph=True"
)
def _attend_eagerly(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    if not is_single_level():
        return _attend_by_reference(compute, q, k, v, backend)
    if not hides_tangent((q, k, v)):
        return compute(q, k, v, backend)
    return _attend_at_one_level(compute, q, k, v, backend)


def _attend_at_one_level(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    """Take the hidden tangents out, compute, and put the result's tangent back."""
    if any(x.tangent is not None for x in (q, k, v)):
        return _attend_by_reference(compute, q, k, v, backend)
    q, k, v = (Dual(*forward_ad.unpack_dual(x.value)) for x in (q, k, v))
    result = compute(q, k, v, backend)
    return Dual(forward_ad.make_dual(result.value, result.tangent))


def _attend_by_reference(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    """Leave the hidden tangents to PyTorch."""
    if backend == "triton":
        raise RuntimeError(
            'tvmatch.attention: the backend "triton" serves one level of forward mode on plain tensors; in '
            "nested transforms, or on Duals whose parts hide tangents themselves, use "
            'backend="auto" or "reference"'
        )
    return compute(q, k, v, "reference")


def is_single_level() -> bool:
    """Whether one `torch.func.jvp` is the only transform of `torch.func`, or `dual_level` stands alone."""
    if not torch._C._are_functorch_transforms_active():
        return True
    innermost = retrieve_current_functorch_interpreter()
    return bool(innermost.level() == 1 and innermost.key() == TransformType.Jvp)
