"""Attention in PyTorch's forward mode: `torch.func.jvp` and `torch.autograd.forward_ad`.

In forward mode a plain tensor carries a hidden tangent. PyTorch's fused attention raises an error for it, and
an operator registered with `torch.library` silently drops it. Here the tangent is unpacked, attention is
computed on Duals with the usual kernels, and the result's tangent is packed again:

    q, q̇ ← unpack_dual(q)    O, Ȯ ← attention of Duals    make_dual(O, Ȯ)

Only a single level of forward mode is handled this way. Nested transforms (`jacfwd`, `hessian`, `grad` of a
jvp, Duals whose parts carry hidden tangents) use the plain reference, which can be differentiated repeatedly.

Under `torch.compile`, a tangent from a transform *outside* the compiled function is invisible to the compiler
and would be dropped. The reference is therefore traced only if its tangents are visible; everything else runs
eagerly, and is an error with `fullgraph=True`.

Importing this module loads the compiler; import it only in forward mode.
"""

from collections.abc import Callable

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from tvmatch.attention.refusals import hides_tangent
from tvmatch.dual import Dual

# Attention on Duals; the last argument names the backend.
Attention = Callable[[Dual, Dual, Dual, str], Dual]


def attend(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    """Compute `compute(q, k, v, backend)` with the tangents of the active forward-mode level.

    Args:
        compute: attention on Duals. Only with the backend "reference" may their parts carry hidden tangents.
        q, k, v: their parts may carry a hidden tangent.
        backend: see `attention`.

    Returns:
        A Dual whose parts carry the tangents of the active level.

    Raises:
        RuntimeError: under `torch.compile(fullgraph=True)`, except for the reference on tangents from a
            transform inside the compiled function; for the backend "triton" inside nested transforms.
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
    """Unpack the hidden tangents, compute, and pack the result's tangent."""
    if any(x.tangent is not None for x in (q, k, v)):
        return _attend_by_reference(compute, q, k, v, backend)
    q, k, v = (Dual(*forward_ad.unpack_dual(x.value)) for x in (q, k, v))
    result = compute(q, k, v, backend)
    return Dual(forward_ad.make_dual(result.value, result.tangent))


def _attend_by_reference(compute: Attention, q: Dual, k: Dual, v: Dual, backend: str) -> Dual:
    """Let PyTorch differentiate the reference."""
    if backend == "triton":
        raise RuntimeError(
            'tvmatch.attention: the backend "triton" supports one level of forward mode on plain tensors; in '
            "nested transforms, or on Duals whose parts carry hidden tangents, use "
            'backend="auto" or "reference"'
        )
    return compute(q, k, v, "reference")


def is_single_level() -> bool:
    """Whether a single `torch.func.jvp`, or a `dual_level` alone, is active."""
    if not torch._C._are_functorch_transforms_active():
        return True
    innermost = retrieve_current_functorch_interpreter()
    return bool(innermost.level() == 1 and innermost.key() == TransformType.Jvp)
