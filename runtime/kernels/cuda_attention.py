"""One decode step's attention in Triton: rotate and append, then attend to what is cached.

Every token belongs to a sequence whose keys and values lie in blocks of T positions of a pool
[blocks, L, 2, G, T, K]; the addresses of the pool and of the sequence's table of blocks, and the
token's position, are read on the device, so one captured graph serves any sequences.
Dimension key: N tokens, L layers, H query heads, G kv heads, K head width, Q query heads of a kv
head, B positions at a time, C = (H + 2 G) K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at(pool_N, n, block, position, layer, which, g, L: tl.constexpr, G: tl.constexpr,
        T: tl.constexpr, K: tl.constexpr, KV: tl.constexpr):  # fmt: skip
    """Where a kv head's key (`which` 0) or value (1) at a position begins, given its block."""
    pool = tl.multiple_of(tl.load(pool_N + n).to(tl.pointer_type(KV)), 16)
    head = ((block * L + layer) * 2 + which) * G + g
    return pool + (head * T + position % T) * K


@triton.jit(do_not_specialize=["layer"])
def rope_append_kernel(
    qkv_NC, q_NHK, cos_SK, sin_SK, pool_N, table_N, position_N, layer,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, H + 2 G). Half-split rotary: element i turns with i + K/2; P >= K/2."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = K // 2
    i_P = tl.arange(0, P)
    is_here_P = i_P < half
    position = tl.load(position_N + n)
    row = qkv_NC + n * (H + 2 * G) * K + head * K
    a_P = tl.load(row + i_P, mask=is_here_P, other=0)
    b_P = tl.load(row + half + i_P, mask=is_here_P, other=0)
    if head < H + G:
        cos_P = tl.load(cos_SK + position * half + i_P, mask=is_here_P, other=0)
        sin_P = tl.load(sin_SK + position * half + i_P, mask=is_here_P, other=0)
        turned_P = a_P * cos_P - b_P * sin_P
        b_P = b_P * cos_P + a_P * sin_P
        a_P = turned_P
    if head < H:
        target = q_NHK + n * H * K + head * K
        tl.store(target + i_P, a_P, mask=is_here_P)
        tl.store(target + half + i_P, b_P, mask=is_here_P)
    else:
        which = (head - H) // G
        g = (head - H) % G
        table = tl.load(table_N + n).to(tl.pointer_type(tl.int64))
        block = tl.load(table + position // T)
        kept = _at(pool_N, n, block, position, layer, which, g, L, G, T, K, KV)
        tl.store(kept + i_P, a_P.to(KV), mask=is_here_P)
        tl.store(kept + half + i_P, b_P.to(KV), mask=is_here_P)


@triton.jit(do_not_specialize=["layer"])
def attention_kernel(
    q_NHK, out_NHK, pool_N, table_N, position_N, layer, scale,
    partial, partial_max, partial_sum, ended,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    W: tl.constexpr, Q: tl.constexpr, B: tl.constexpr, NUM_SPLITS: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Grid (tokens * G, splits of the positions). W >= K and Q >= H / G are powers of two.

    `partial` [tokens * G, splits, Q, W], `partial_max` and `partial_sum` [tokens * G, splits, Q];
    `ended` int32 [tokens * G], zero before and after. Splits are joined in a fixed order.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    n, g = (pair // G).to(tl.int64), pair % G
    heads: tl.constexpr = H // G
    q_Q, k_W = tl.arange(0, Q), tl.arange(0, W)
    is_head_Q, is_here_W = q_Q < heads, k_W < K
    here_QW = is_head_Q[:, None] & is_here_W[None, :]
    at_QW = n * H * K + (g * heads + q_Q)[:, None] * K + k_W[None, :]
    q_QW = tl.load(q_NHK + at_QW, mask=here_QW, other=0) * scale
    table = tl.load(table_N + n).to(tl.pointer_type(tl.int64))
    length = tl.load(position_N + n) + 1
    share = tl.cdiv(tl.cdiv(length, NUM_SPLITS), B) * B
    first = split * share
    end = tl.minimum(first + share, length)
    max_Q = tl.full((Q,), float("-inf"), tl.float32)
    sum_Q = tl.zeros((Q,), tl.float32)
    out_QW = tl.zeros((Q, W), tl.float32)
    while first < end:
        position_B = first + tl.arange(0, B)
        here_BW = (position_B < end)[:, None] & is_here_W[None, :]
        block_B = tl.load(table + position_B // T, mask=position_B < end, other=0)
        key_B = _at(pool_N, n, block_B, position_B, layer, 0, g, L, G, T, K, KV)
        key_BW = key_B[:, None] + k_W[None, :]
        k_BW = tl.load(key_BW, mask=here_BW, other=0).to(tl.float32)
        v_BW = tl.load(key_BW + G * T * K, mask=here_BW, other=0).to(tl.float32)
        score_QB = tl.sum(q_QW[:, None, :] * k_BW[None, :, :], axis=2)
        score_QB = tl.where((position_B < end)[None, :], score_QB, float("-inf"))
        new_max_Q = tl.maximum(max_Q, tl.max(score_QB, axis=1))
        weight_QB = tl.exp(score_QB - new_max_Q[:, None])
        shrink_Q = tl.exp(max_Q - new_max_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(weight_QB, axis=1)
        out_QW = out_QW * shrink_Q[:, None] + tl.sum(
            weight_QB[:, :, None] * v_BW[None, :, :], axis=1
        )
        max_Q = new_max_Q
        first += B
    at = pair * NUM_SPLITS + split
    tl.store(partial_max + at * Q + q_Q, max_Q)
    tl.store(partial_sum + at * Q + q_Q, sum_Q)
    tl.store(partial + at * Q * W + q_Q[:, None] * W + k_W[None, :], out_QW)
    tl.debug_barrier()  # all of this program's sums are written before it says so
    if tl.atomic_add(ended + pair, 1, sem="acq_rel") == NUM_SPLITS - 1:
        max_Q = tl.full((Q,), float("-inf"), tl.float32)
        for other in range(0, NUM_SPLITS):
            at_Q = (pair * NUM_SPLITS + other) * Q + q_Q
            max_Q = tl.maximum(max_Q, tl.load(partial_max + at_Q, cache_modifier=".cg"))
        sum_Q = tl.zeros((Q,), tl.float32)
        out_QW = tl.zeros((Q, W), tl.float32)
        for other in range(0, NUM_SPLITS):
            at_Q = (pair * NUM_SPLITS + other) * Q + q_Q
            share_Q = tl.exp(tl.load(partial_max + at_Q, cache_modifier=".cg") - max_Q)
            sum_Q += share_Q * tl.load(partial_sum + at_Q, cache_modifier=".cg")
            part_QW = tl.load(partial + at_Q[:, None] * W + k_W[None, :], cache_modifier=".cg")
            out_QW += share_Q[:, None] * part_QW
        tl.store(out_NHK + at_QW, out_QW / sum_Q[:, None], mask=here_QW)
        tl.store(ended + pair, 0)
