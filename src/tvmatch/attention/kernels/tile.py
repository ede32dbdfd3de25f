"""Load and store tiles of (B, H, rows, D) tensors with any strides of the first three dimensions."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(blocks, heads):
    """This program's block of rows and its place (batch index, head); blocks of one head are consecutive."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks
    return block, (head // heads, head % heads)


@triton.jit
def first_row(place, heads, rows):
    """Offset of a head in row statistics (B, H, rows)."""
    return (place[0].to(tl.int64) * heads + place[1]) * rows


@triton.jit
def load_tile(
    tensor, strides, place, row, rows, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows `row` … `row` + BLOCK_ROWS as (BLOCK_ROWS, BLOCK_D), zero outside the tensor.

    `tensor` is a pointer with the strides (batch, head, row), or a tensor descriptor, which has its own
    strides and is loaded by the copy engine of Hopper GPUs.
    """
    if isinstance(tensor, tl.tensor_descriptor):
        return tensor.load([place[0], place[1], row, 0]).reshape([BLOCK_ROWS, BLOCK_D])
    else:
        index = row + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, BLOCK_D)
        start = place[0].to(tl.int64) * strides[0] + place[1].to(tl.int64) * strides[1]
        pointers = tensor + start + index[:, None].to(tl.int64) * strides[2] + column[None, :]
        return tl.load(pointers, mask=(index < rows)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    tensor, strides, place, row, rows, tile, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write (BLOCK_ROWS, BLOCK_D) to the rows from `row` on, in the tensor's dtype."""
    index = row + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    start = place[0].to(tl.int64) * strides[0] + place[1].to(tl.int64) * strides[1]
    pointers = tensor + start + index[:, None].to(tl.int64) * strides[2] + column[None, :]
    mask = (index < rows)[:, None] & (column < D)[None, :]
    tl.store(pointers, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def key_count(key_lengths, place, M):
    """The number of keys of this sample that are not masked."""
    if key_lengths is None:
        return M
    else:
        return tl.load(key_lengths + place[0]).to(tl.int32)


@triton.jit
def product(a, b, accumulator):
    """accumulator + a b in float32, without TF32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")
