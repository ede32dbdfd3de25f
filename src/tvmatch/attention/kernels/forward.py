"""Forward pass: O, Ȯ and the row statistics for the backward pass, in one loop over the keys.

    S = α Q Kᵀ    Ṡ = α (Q̇ Kᵀ + Q K̇ᵀ)    P = softmax(S)    μ_i = Σ_j P_ij Ṡ_ij
    O = P V       Ȯ = [P ∘ (Ṡ − μ)] V + P V̇

The sums are relative to a running maximum m (FlashAttention, arXiv 2205.14135) and, for the tangent, to a
running mean r of Ṡ: the rounding error of P ∘ (Ṡ − r) in half precision is then relative to the spread of Ṡ
in a row, not to its mean. Per tile of keys, with p = 2^(S log₂e − m'), a = 2^(m − m'):

    l' = a l + Σ p            r' = r + Σ p (Ṡ − r) / l'
    U' = a U + p V            W' = a (W − (r' − r) U) + [p ∘ (Ṡ − r')] V + p V̇

and at the end O = U / l, Ȯ = W / l, μ = r, log₂ Σ 2^(S log₂e) = m + log₂ l.
"""

import triton
import triton.language as tl

from tvmatch.attention.kernels.tile import (
    LOG2_E,
    first_row,
    key_count,
    load_tile,
    locate,
    product,
    store_tile,
)


@triton.jit
def attention_forward(
    q,
    k,
    v,
    q_tangent,
    k_tangent,
    v_tangent,
    key_lengths,
    output,
    output_tangent,
    log_sum_exp,
    mean,
    q_strides,
    k_strides,
    v_strides,
    q_tangent_strides,
    k_tangent_strides,
    v_tangent_strides,
    output_strides,
    output_tangent_strides,
    scale,
    heads,
    N,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program per block of queries. Absent tangents are None; `log_sum_exp` and `mean` are (B, H, N).

    MASKED: a tile may contain masked keys.
    """
    SCORES_TANGENT: tl.constexpr = (q_tangent is not None) or (k_tangent is not None)
    block, place = locate(tl.cdiv(N, BLOCK_QUERIES), heads)
    if CAUSAL:
        block = tl.cdiv(N, BLOCK_QUERIES) - 1 - block  # the longest rows first, to balance the load
    first_query = block * BLOCK_QUERIES
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    keys = key_count(key_lengths, place, M)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first_query + BLOCK_QUERIES)

    Q = load_tile(q, q_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
    if q_tangent is not None:
        Q_dot = load_tile(q_tangent, q_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
    maximum = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    centre = tl.zeros([BLOCK_QUERIES], tl.float32)
    U = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    W = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)

    for first_key in range(0, end, BLOCK_KEYS):
        K = load_tile(k, k_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
        S = tl.dot(Q, K.T, input_precision="ieee") * (scale * LOG2_E)
        if SCORES_TANGENT:
            S_dot = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
            if q_tangent is not None:
                S_dot = product(Q_dot, K.T, S_dot)
            if k_tangent is not None:
                K_dot = load_tile(k_tangent, k_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
                S_dot = product(Q, K_dot.T, S_dot)
            S_dot = S_dot * scale
        if MASKED:
            key = first_key + tl.arange(0, BLOCK_KEYS)
            counts = (key < keys)[None, :]
            if CAUSAL:
                counts = counts & (key[None, :] <= query[:, None])
            S = tl.where(counts, S, float("-inf"))  # S alone: -inf in its tangent would give 0 · ∞

        raised = tl.maximum(maximum, tl.max(S, 1))
        # In a row without keys so far, -inf - -inf would be NaN.
        reference = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        P = tl.math.exp2(S - reference[:, None])
        decay = tl.math.exp2(maximum - reference)
        maximum = raised
        total = total * decay + tl.sum(P, 1)
        if SCORES_TANGENT:
            divisor = tl.where(total == 0.0, 1.0, total) if MASKED else total
            shift = tl.sum(P * (S_dot - centre[:, None]), 1) / divisor
            centre += shift
            W = W - shift[:, None] * U
            P_dot = P * (S_dot - centre[:, None])
        U = U * decay[:, None]
        W = W * decay[:, None]
        V = load_tile(v, v_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
        P = P.to(V.dtype)
        U = product(P, V, U)
        if SCORES_TANGENT:
            W = product(P_dot.to(V.dtype), V, W)
        if v_tangent is not None:
            V_dot = load_tile(v_tangent, v_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
            W = product(P, V_dot, W)

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    inverse = 1.0 / divisor
    U = U * inverse[:, None]
    store_tile(output, output_strides, place, first_query, N, U, D, BLOCK_QUERIES, BLOCK_D)
    row = first_row(place, heads, N) + query
    tl.store(log_sum_exp + row, tl.where(empty, 0.0, maximum + tl.math.log2(divisor)), mask=query < N)
    if output_tangent is not None:
        W = W * inverse[:, None]
        store_tile(
            output_tangent, output_tangent_strides, place, first_query, N, W, D, BLOCK_QUERIES, BLOCK_D
        )
    if SCORES_TANGENT:
        tl.store(mean + row, centre, mask=query < N)
