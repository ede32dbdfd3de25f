"""Triton kernels of attention on (value, tangent), imported only by `tvmatch.attention.launch`.

Names: B batch, H heads, N queries, M keys, D head width. The equations are in `forward`,
`query_gradients` and docs/attention.md. Logits are in base 2: p = 2^(S log₂e − m).
"""
