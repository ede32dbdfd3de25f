"""dQ and dQ̇, with the equations of the whole backward pass: six gradients from four numbers per row.

With G and Ġ the cotangents of O and Ȯ, A = G Vᵀ + Ġ V̇ᵀ, B = Ġ Vᵀ, β_i = Ġ_i · O_i,
δ_i = G_i · O_i + Ġ_i · Ȯ_i, and P, Ṡ, μ as in `forward` (P is computed from the stored
log-sum-exp and therefore normalised):

    dṠ = P ∘ (B − β)                dS = P ∘ [A − δ + (Ṡ − μ) ∘ (B − β)]
    dQ = α (dS K + dṠ K̇)            dQ̇ = α dṠ K
    dK = α (dSᵀ Q + dṠᵀ Q̇)          dK̇ = α dṠᵀ Q
    dV = Pᵀ G + [P ∘ (Ṡ − μ)]ᵀ Ġ    dV̇ = Pᵀ Ġ

Without Ġ this is the backward pass of the value alone. Each gradient is written by one program, so
that results are deterministic. Row statistics are initial values of accumulators: added after a matrix
product, they would make the compiler wait for the product and serialise the products of a tile.
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
def query_gradients(
    q,
    k,
    v,
    q_tangent,
    k_tangent,
    v_tangent,
    output,
    output_tangent,
    g,
    g_tangent,
    key_lengths,
    log_sum_exp,
    mean,
    beta,
    delta,
    q_gradient,
    q_tangent_gradient,
    q_strides,
    k_strides,
    v_strides,
    q_tangent_strides,
    k_tangent_strides,
    v_tangent_strides,
    output_strides,
    output_tangent_strides,
    g_strides,
    g_tangent_strides,
    q_gradient_strides,
    q_tangent_gradient_strides,
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
    """dQ and dQ̇, one program per block of queries. Also writes β and δ, float32 (B, H, N).

    `g` and `g_tangent` are the cotangents G and Ġ. Absent tensors are None; a gradient that is None, and
    everything that only it needs, is not computed.
    """
    OF_Q: tl.constexpr = q_gradient is not None
    OF_TANGENT: tl.constexpr = q_tangent_gradient is not None
    SCORES_TANGENT: tl.constexpr = (g_tangent is not None) and (
        (q_tangent is not None) or (k_tangent is not None)
    )
    block, place = locate(tl.cdiv(N, BLOCK_QUERIES), heads)
    if CAUSAL:
        block = tl.cdiv(N, BLOCK_QUERIES) - 1 - block  # the longest rows first, to balance the load
    first_query = block * BLOCK_QUERIES
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    keys = key_count(key_lengths, place, M)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first_query + BLOCK_QUERIES)
    row = first_row(place, heads, N) + query
    exists = query < N

    output_tile = load_tile(output, output_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D).to(
        tl.float32
    )
    if g_tangent is not None:
        G_dot = load_tile(g_tangent, g_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
    if SCORES_TANGENT:
        row_beta = tl.sum(G_dot.to(tl.float32) * output_tile, 1)
        tl.store(beta + row, row_beta, mask=exists)
    if OF_Q:
        row_delta = tl.zeros([BLOCK_QUERIES], tl.float32)
        if g is not None:
            G = load_tile(g, g_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
            row_delta += tl.sum(G.to(tl.float32) * output_tile, 1)
        if g_tangent is not None:
            O_dot = load_tile(
                output_tangent, output_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D
            )
            row_delta += tl.sum(G_dot.to(tl.float32) * O_dot.to(tl.float32), 1)
        tl.store(delta + row, row_delta, mask=exists)
        if SCORES_TANGENT:
            row_mean = tl.load(mean + row, mask=exists, other=0.0)
        dQ = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    if OF_TANGENT:
        dQ_dot = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    normalizer = tl.load(log_sum_exp + row, mask=exists, other=0.0)
    Q = load_tile(q, q_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
    if OF_Q and SCORES_TANGENT and q_tangent is not None:
        Q_dot = load_tile(q_tangent, q_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)

    for first_key in range(0, end, BLOCK_KEYS):
        K = load_tile(k, k_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
        V = load_tile(v, v_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
        P = tl.math.exp2(tl.dot(Q, K.T, input_precision="ieee") * (scale * LOG2_E) - normalizer[:, None])
        if MASKED:
            key = first_key + tl.arange(0, BLOCK_KEYS)
            counts = (key < keys)[None, :]
            if CAUSAL:
                counts = counts & (key[None, :] <= query[:, None])
            P = tl.where(counts, P, 0.0)
        if SCORES_TANGENT:
            B = tl.dot(G_dot, V.T, input_precision="ieee") - row_beta[:, None]
            dS_dot = (P * B).to(K.dtype)
        if OF_Q:
            A = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32) - row_delta[:, None]
            if SCORES_TANGENT:
                S_dot = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
                if q_tangent is not None:
                    S_dot = product(Q_dot, K.T, S_dot)
                if k_tangent is not None:
                    K_dot = load_tile(
                        k_tangent, k_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D
                    )
                    S_dot = product(Q, K_dot.T, S_dot)
                A += (S_dot * scale - row_mean[:, None]) * B
            if g is not None:
                A = product(G, V.T, A)
            if g_tangent is not None and v_tangent is not None:
                V_dot = load_tile(v_tangent, v_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
                A = product(G_dot, V_dot.T, A)
            dS = (P * A).to(K.dtype)
            if SCORES_TANGENT and k_tangent is not None:
                dQ = product(dS_dot, K_dot, dQ)
            dQ = product(dS, K, dQ)
        if OF_TANGENT:
            dQ_dot = product(dS_dot, K, dQ_dot)

    if OF_Q:
        dQ = dQ * scale
        store_tile(q_gradient, q_gradient_strides, place, first_query, N, dQ, D, BLOCK_QUERIES, BLOCK_D)
    if OF_TANGENT:
        dQ_dot = dQ_dot * scale
        store_tile(
            q_tangent_gradient,
            q_tangent_gradient_strides,
            place,
            first_query,
            N,
            dQ_dot,
            D,
            BLOCK_QUERIES,
            BLOCK_D,
        )
