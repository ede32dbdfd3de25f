"""Triton kernels of attention on (value, tangent). Only `tvmatch.attention.launch` imports them.

Names: B batch, H heads, N queries, M keys, D head width. Matrices are those of DESIGN's section on attention,
restated in `forward` and `backward`. Logits are kept in base 2: p = 2^(S log₂e − m).
"""
