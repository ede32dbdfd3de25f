"""Triton kernels of attention on (value, tangent). Only `tvmatch.attention.launch` imports them.

Names: B batch, H heads, N queries, M keys, D head width. The mathematics is in `forward`, in
`query_gradients` and in docs/attention.md. Logits are kept in base 2: p = 2^(S log₂e − m).
"""
