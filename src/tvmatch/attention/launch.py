"""Kernel launchers: allocate the outputs, choose the tiles, start the kernels. No autograd here."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tvmatch.attention.kernels.forward import attention_forward
from tvmatch.attention.kernels.key_gradients import key_gradients
from tvmatch.attention.kernels.query_gradients import query_gradients
from tvmatch.attention.operands import Forward, Gradients, Operands, empty_like_heads, empty_rows
from tvmatch.attention.tiles import HOPPER_SHARED_MEMORY, Tile, Tiles, tiles_for

INTERPRETED = isinstance(attention_forward, InterpretedFunction)


def forward(
    operands: Operands,
    key_lengths: Tensor | None,
    scale: float,
    causal: bool,
    *,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> Forward:
    """Compute O, Ȯ and the row statistics.

    Args:
        operands: on one device, with the same dtype.
        key_lengths: integers (B,) in 0 … M, or None for M.
        scale: α.
        causal: query i attends only to keys j ≤ i.
        tile: overrides the tile table.
        descriptors: read through tensor descriptors if the layout allows it. None: on GPUs that support them.
    """
    q = operands.q
    result = Forward(
        empty_like_heads(q),
        empty_like_heads(q) if operands.has_tangent else None,
        empty_rows(q),
        empty_rows(q) if operands.has_scores_tangent else None,
    )
    if q.numel() == 0:
        return result
    tile = tile or _tiles(q, tangent=operands.has_tangent).forward
    problem = _Problem(operands, key_lengths, scale, causal, descriptors)
    problem.start(
        attention_forward,
        tile,
        read={},
        written={"output": result.output, "output_tangent": result.output_tangent},
        rows={"log_sum_exp": result.log_sum_exp, "mean": result.mean},
    )
    return result


def backward(
    operands: Operands,
    result: Forward,
    gradient: Tensor | None,
    tangent_gradient: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: bool,
    *,
    tiles: Tiles | None = None,
    descriptors: bool | None = None,
) -> Gradients:
    """Compute all gradients from the cotangents G of O and Ġ of Ȯ, one of which may be None.

    Args:
        operands: those of the forward pass.
        result: of the forward pass.
        gradient: G, of O's shape, or None for zero.
        tangent_gradient: Ġ, or None for zero; then the tangents have no gradient.
        key_lengths, scale, causal, descriptors: as in `forward`.
        tiles: overrides the tile table.
    """
    if tangent_gradient is None:
        operands = Operands(*operands[:3])
    q = operands.q
    gradients = Gradients(*(None if x is None else empty_like_heads(x) for x in operands))  # type: ignore[arg-type]
    if q.numel() == 0:
        return gradients
    tiles = tiles or _tiles(q, tangent=tangent_gradient is not None)
    problem = _Problem(operands, key_lengths, scale, causal, descriptors)
    cotangents = {"g": _readable(gradient), "g_tangent": _readable(tangent_gradient)}
    rows = {
        "log_sum_exp": result.log_sum_exp,
        "mean": result.mean,
        "beta": empty_rows(q) if operands.has_scores_tangent else None,
        "delta": empty_rows(q),
    }
    query_outputs = {"output": _readable(result.output), "output_tangent": _readable(result.output_tangent)}
    for kernel, names, parts, read in [
        (query_gradients, ("q", "q_tangent"), tiles.query_gradients, cotangents | query_outputs),
        (key_gradients, ("k", "k_tangent", "v", "v_tangent"), tiles.key_gradients, cotangents),
    ]:
        for part in parts:
            written = {
                f"{name}_gradient": getattr(gradients, name) if name in part.gradients else None
                for name in names
            }
            if any(x is not None for x in written.values()):
                problem.start(kernel, part.tile, read=read, written=written, rows=rows)
    return gradients


class _Problem:
    """The inputs of one attention that all kernels read."""

    def __init__(
        self,
        operands: Operands,
        key_lengths: Tensor | None,
        scale: float,
        causal: bool,
        descriptors: bool | None,
    ) -> None:
        self.operands = Operands(*map(_readable, operands))  # type: ignore[arg-type]
        self.key_lengths = None if key_lengths is None else key_lengths.contiguous()
        self.scale, self.causal = scale, causal
        self.descriptors = _has_copy_engine(operands.q.device) if descriptors is None else descriptors

    def start(
        self,
        kernel: Any,
        tile: Tile,
        *,
        read: dict[str, Tensor | None],
        written: dict[str, Tensor | None],
        rows: dict[str, Tensor | None],
    ) -> None:
        """Launch `kernel`; `read` and `written` have rows like q (or k, if written), `rows` are (B, H, N)."""
        q, k = self.operands.q, self.operands.k
        batch, heads, queries, head_dim = q.shape
        keys, block_d = k.shape[2], _block_d(q)
        by_keys = kernel is key_gradients
        if by_keys:  # the rows beyond the end of the last block are not stored
            masked, blocks = False, triton.cdiv(keys, tile.keys)
        else:
            masked, blocks = keys % tile.keys != 0, triton.cdiv(queries, tile.queries)

        tensors = self.operands._asdict() | read
        arguments: dict[str, Any] = dict(written)
        for name, x in tensors.items():
            block = tile.keys if name[0] in "kv" else tile.queries
            arguments[name] = _descriptor(x, block, block_d) if self.descriptors and x is not None else x
        for name, x in (tensors | written).items():
            arguments[f"{name}_strides"] = None if x is None else x.stride()[:3]
        if by_keys:
            arguments["inverse_scale"] = 1 / self.scale if self.scale else 0.0
        with torch.cuda.device_of(q):
            kernel[(blocks * heads * batch,)](
                **arguments,
                **rows,
                key_lengths=self.key_lengths,
                scale=self.scale,
                heads=heads,
                N=queries,
                M=keys,
                D=head_dim,
                BLOCK_D=block_d,
                BLOCK_QUERIES=tile.queries,
                BLOCK_KEYS=tile.keys,
                CAUSAL=self.causal,
                MASKED=masked or self.causal or self.key_lengths is not None,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _tiles(q: Tensor, *, tangent: bool) -> Tiles:
    """The tiles for tensors like q on their device."""
    limit = HOPPER_SHARED_MEMORY
    if q.device.type == "cuda":
        limit = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", limit)
    return tiles_for(_block_d(q), q.itemsize, tangent=tangent, shared_memory=limit)


def _block_d(q: Tensor) -> int:
    """The head width, padded to a power of two of at least 16."""
    return max(16, 1 << (q.shape[3] - 1).bit_length())


def _readable(x: Tensor | None) -> Tensor | None:
    """x with contiguous rows, copied if necessary; other strides are free."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _descriptor(x: Tensor, block_rows: int, block_d: int) -> Any:
    """A tensor descriptor, or `x` if its strides are not multiples of 16 bytes."""
    unit = 16 // x.itemsize
    row = triton.cdiv(x.shape[3], unit) * unit
    strides = list(x.stride())
    for dimension, size in enumerate(x.shape):
        if size == 1:  # any stride is valid here, and descriptors require at least a row
            strides[dimension] = row if dimension < 3 else 1
    if x.data_ptr() % 16 or any(stride % unit or stride < row for stride in strides[:3]):
        return x
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, block_rows, block_d])


def _has_copy_engine(device: torch.device) -> bool:
    """Whether the GPU loads tensor descriptors in hardware (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
