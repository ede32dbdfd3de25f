"""Counting the memory that a DiT's block holds between the forward and the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from training_contenders import Case, accelerate

from tvmatch.dual import Dual
from tvmatch.models import BaseNetwork, layers
from tvmatch.models.dit import DiTBlock, DiTSize


@torch.library.custom_op("tvmatch_benchmark::attention", mutates_args=())
def _attention(operands: list[Tensor]) -> list[Tensor]:
    """Of the shapes that the fused attention returns: outputs, and one number a row and output."""
    outputs, like = len(operands) // 3, operands[0]
    rows = [like.new_zeros(like.shape[:-1], dtype=torch.float32) for _ in range(outputs)]
    return [*(torch.zeros_like(like) for _ in range(outputs)), *rows]


@_attention.register_fake
def _(operands: list[Tensor]) -> list[Tensor]:
    outputs, like = len(operands) // 3, operands[0]
    rows = [like.new_empty(like.shape[:-1], dtype=torch.float32) for _ in range(outputs)]
    return [*(torch.empty_like(like) for _ in range(outputs)), *rows]


def _save(ctx: Any, inputs: tuple[list[Tensor]], output: list[Tensor]) -> None:
    ctx.operands = len(inputs[0])
    ctx.save_for_backward(*inputs[0], *output)


def _differentiate(ctx: Any, *_: Any) -> list[Tensor]:
    return [x.clone() for x in ctx.saved_tensors[: ctx.operands]]


_attention.register_autograd(_differentiate, setup_context=_save)


def stand_in_attention(q: Dual, k: Dual, v: Dual) -> Dual:
    """Keeps what the fused attention keeps, and computes nothing: so it runs anywhere."""
    tangents = [x.tangent for x in (q, k, v) if x.tangent is not None]
    results = _attention([q.value, k.value, v.value, *tangents])
    return Dual(*results[: len(results) // 2])


def held_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that are allocated by `function` and not freed while what it returns lives."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = function()
        return torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    return int(sum(event.self_cpu_memory_usage for event in profiler.key_averages()))


def bytes_of_a_token(
    block: nn.Module, size: DiTSize, tokens: int, has_tangent: bool, device: torch.device
) -> float:
    """What a block adds to the memory held until the backward pass, its result included and its input not.

    The difference between two images and one, so that weights and their copies in half precision cancel.
    """
    held = []
    for batch in (1, 2):
        x, activated = (
            _random_dual((batch, *rest, size.hidden_size), has_tangent, device) for rest in ((tokens,), ())
        )

        def forward(x: Dual = x, activated: Dual = activated) -> object:
            with torch.autocast(device.type, torch.bfloat16):
                return block(x, activated)

        torch.compiler.reset()
        forward()  # compiles
        held.append(held_bytes(forward, device))
    return (held[1] - held[0]) / tokens


class OneBlock(BaseNetwork):
    """A block as the network that recomputation is applied to."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def dual_blocks(self) -> list[nn.Module]:
        """The block."""
        return [self.block]


def _accelerate_block(block: nn.Module, *, recompute: str = "none", compiled: bool = False) -> None:
    network = OneBlock(block)
    accelerate(network, recompute=recompute)
    if compiled:
        accelerate(block, compiled=True)


def _random_dual(shape: tuple[int, ...], has_tangent: bool, device: torch.device) -> Dual:
    value, tangent = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    return Dual(value, tangent if has_tangent else None)


def activation_table(case: Case, device: torch.device) -> str:
    """Bytes a token and block, with and without a tangent, and for the whole network and batch of the case.

    Counted under bfloat16 autocast. "compiled" is the compiler's own choice of what to keep.
    """
    size = case.config.size()
    tokens = case.shape[1] * case.shape[2] // size.patch_size**2
    all_tokens = case.batch * tokens * size.depth
    rows = []
    own_attention, own_compile = layers.attention, torch.compile
    try:
        layers.attention = stand_in_attention  # type: ignore[assignment]
        # The whole of the compiler but its code generation, which changes nothing here and takes a minute.
        torch.compile = partial(own_compile, backend="aot_eager_decomp_partition")  # type: ignore[assignment]
        for name, options in {
            "eager": {},
            "eager, recompute pointwise": {"recompute": "pointwise"},
            "eager, recompute blocks": {"recompute": "blocks"},
            "compiled": {"compiled": True},
            "compiled, recompute pointwise": {"compiled": True, "recompute": "pointwise"},
            "compiled, recompute blocks": {"compiled": True, "recompute": "blocks"},
        }.items():
            counts = []
            for has_tangent in (True, False):
                block = DiTBlock(size, case.config).to(device)
                _accelerate_block(block, **options)  # type: ignore[arg-type]
                counts.append(bytes_of_a_token(block, size, tokens, has_tangent, device))
            rows.append((name, *(round(x) for x in counts), sum(counts) * all_tokens / 1e9))
    finally:
        layers.attention, torch.compile = own_attention, own_compile
        torch.compiler.reset()
    whole = f"GB of {size.depth} × {case.batch} × {tokens}"
    return common.table(("blocks", "bytes a token, value and tangent", "value alone", whole), rows)
