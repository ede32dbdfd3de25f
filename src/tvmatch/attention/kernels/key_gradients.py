"""dK, dK̇, dV and dV̇; the equations are in `query_gradients`."""

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
def key_gradients(
    q,
    k,
    v,
    q_tangent,
    k_tangent,
    v_tangent,
    g,
    g_tangent,
    key_lengths,
    log_sum_exp,
    mean,
    beta,
    delta,
    k_gradient,
    k_tangent_gradient,
    v_gradient,
    v_tangent_gradient,
    q_strides,
    k_strides,
    v_strides,
    q_tangent_strides,
    k_tangent_strides,
    v_tangent_strides,
    g_strides,
    g_tangent_strides,
    k_gradient_strides,
    k_tangent_gradient_strides,
    v_gradient_strides,
    v_tangent_gradient_strides,
    scale,
    inverse_scale,
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
    """dK, dK̇, dV, dV̇, one program per block of keys. Tiles are transposed: their rows are keys.

    A gradient that is None, and everything that only it needs, is not computed: for large D the launcher
    computes them in several launches, since four accumulators do not fit into the registers. `inverse_scale`
    is 1 / `scale`, or 0 if `scale` is 0.
    """
    OF_K: tl.constexpr = k_gradient is not None
    OF_K_TANGENT: tl.constexpr = k_tangent_gradient is not None
    OF_V: tl.constexpr = v_gradient is not None
    OF_V_TANGENT: tl.constexpr = v_tangent_gradient is not None
    SCORES_TANGENT: tl.constexpr = (g_tangent is not None) and (
        (q_tangent is not None) or (k_tangent is not None)
    )
    block, place = locate(tl.cdiv(M, BLOCK_KEYS), heads)
    first_key = block * BLOCK_KEYS
    key = first_key + tl.arange(0, BLOCK_KEYS)
    keys = key_count(key_lengths, place, M)
    start = 0
    if CAUSAL:
        start = first_key // BLOCK_QUERIES * BLOCK_QUERIES
    start = tl.where(first_key < keys, start, N)  # all keys are masked: write zeros

    K = load_tile(k, k_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
    if (OF_K or OF_V) and SCORES_TANGENT and k_tangent is not None:
        K_dot = load_tile(k_tangent, k_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
    if OF_K or OF_K_TANGENT:
        V = load_tile(v, v_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
    if OF_K:
        if g_tangent is not None and v_tangent is not None:
            V_dot = load_tile(v_tangent, v_tangent_strides, place, first_key, M, D, BLOCK_KEYS, BLOCK_D)
        dK = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    if OF_K_TANGENT:
        dK_dot = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    if OF_V:
        dV = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    if OF_V_TANGENT:
        dV_dot = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)

    for first_query in range(start, N, BLOCK_QUERIES):
        query = first_query + tl.arange(0, BLOCK_QUERIES)
        row = first_row(place, heads, N) + query
        exists = query < N
        Q = load_tile(q, q_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
        if (OF_K or OF_V) and g is not None:
            G = load_tile(g, g_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
        if g_tangent is not None:
            G_dot = load_tile(g_tangent, g_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D)
        normalizer = tl.load(log_sum_exp + row, mask=exists, other=0.0)
        P = tl.math.exp2(tl.dot(K, Q.T, input_precision="ieee") * (scale * LOG2_E) - normalizer[None, :])
        if MASKED:
            counts = (key < keys)[:, None]
            if CAUSAL:
                counts = counts & (key[:, None] <= query[None, :])
            P = tl.where(counts, P, 0.0)
        if (OF_K or OF_V) and SCORES_TANGENT:
            S_dot = tl.zeros([BLOCK_KEYS, BLOCK_QUERIES], tl.float32)
            S_dot -= tl.load(mean + row, mask=exists, other=0.0)[None, :] * inverse_scale
            if k_tangent is not None:
                S_dot = product(K_dot, Q.T, S_dot)
            if q_tangent is not None:
                Q_dot = load_tile(
                    q_tangent, q_tangent_strides, place, first_query, N, D, BLOCK_QUERIES, BLOCK_D
                )
                S_dot = product(K, Q_dot.T, S_dot)
            S_dot = S_dot * scale
        if OF_V_TANGENT:
            dV_dot = product(P.to(K.dtype), G_dot, dV_dot)
        if OF_V:
            if g is not None:
                dV = product(P.to(K.dtype), G, dV)
            if SCORES_TANGENT:
                dV = product((P * S_dot).to(K.dtype), G_dot, dV)
        if (OF_K or OF_K_TANGENT) and SCORES_TANGENT:
            B = tl.zeros([BLOCK_KEYS, BLOCK_QUERIES], tl.float32)
            B -= tl.load(beta + row, mask=exists, other=0.0)[None, :]
            B = product(V, G_dot.T, B)
            dS_dot = (P * B).to(K.dtype)
        if OF_K_TANGENT:
            dK_dot = product(dS_dot, Q, dK_dot)
        if OF_K:
            A = tl.zeros([BLOCK_KEYS, BLOCK_QUERIES], tl.float32)
            A -= tl.load(delta + row, mask=exists, other=0.0)[None, :]
            if SCORES_TANGENT:
                A += S_dot * B
            if g is not None:
                A = product(V, G.T, A)
            if g_tangent is not None and v_tangent is not None:
                A = product(V_dot, G_dot.T, A)
            dS = (P * A).to(K.dtype)
            if SCORES_TANGENT and q_tangent is not None:
                dK = product(dS_dot, Q_dot, dK)
            dK = product(dS, Q, dK)

    if OF_K:
        dK = dK * scale
        store_tile(k_gradient, k_gradient_strides, place, first_key, M, dK, D, BLOCK_KEYS, BLOCK_D)
    if OF_K_TANGENT:
        dK_dot = dK_dot * scale
        store_tile(
            k_tangent_gradient,
            k_tangent_gradient_strides,
            place,
            first_key,
            M,
            dK_dot,
            D,
            BLOCK_KEYS,
            BLOCK_D,
        )
    if OF_V:
        store_tile(v_gradient, v_gradient_strides, place, first_key, M, dV, D, BLOCK_KEYS, BLOCK_D)
    if OF_V_TANGENT:
        store_tile(
            v_tangent_gradient,
            v_tangent_gradient_strides,
            place,
            first_key,
            M,
            dV_dot,
            D,
            BLOCK_KEYS,
            BLOCK_D,
        )
