"""Device functions that the Triton kernels share: tiles of weight rows, lists of few among many.

Run on a CPU too, with TRITON_INTERPRET=1. A weight row is read only where its mask says so; what
is masked is never touched and counts as zero. BITS says how a row is stored: 16 for bf16, 32 for
fp32; 8 and 4 are the records of quantized.py; 7 is int8 without a scale (the caller has one per
row); 1 is a sign per column, eight to a byte.
Dimension key: N tokens, D model width, F neurons, R rows of a tile, C columns of a tile, G groups
of columns, S neurons that a program looks after.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # columns that share a scale: quantized.GROUP
HALF = tl.constexpr(16)
# The interpreter keeps bf16 as bit patterns and multiplies those.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(w_OD, row_R, wanted_R, first, D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Columns [first, first + C) of some rows, fp32 (bf16 stays bf16); zero where not wanted."""
    if BITS == 8:
        tile_RC = _load_bytes(w_OD, row_R, wanted_R, first, D, C)
    elif BITS == 4:
        tile_RC = _load_nibbles(w_OD, row_R, wanted_R, first, D, C)
    else:
        column_C = first + tl.arange(0, C)
        wanted_RC = wanted_R[:, None] & (column_C < D)[None, :]
        if BITS == 1:
            at_RC = row_R[:, None].to(tl.int64) * (D // 8) + (column_C // 8)[None, :]
            byte_RC = tl.load(w_OD + at_RC, mask=wanted_RC, other=0).to(tl.int32)
            set_RC = (byte_RC >> (column_C % 8)[None, :]) & 1
            tile_RC = tl.where(wanted_RC, set_RC.to(tl.float32) * 2 - 1, 0.0)
        else:
            at_RC = row_R[:, None].to(tl.int64) * D + column_C[None, :]
            tile_RC = tl.load(w_OD + at_RC, mask=wanted_RC, other=0)
            if BITS == 7:
                tile_RC = tile_RC.to(tl.float32)
    return tile_RC


@triton.jit
def _load_bytes(w_OB, row_R, wanted_R, first, D: tl.constexpr, C: tl.constexpr):
    """scale * q; a record is D numbers and then D / 32 fp16 scales."""
    record: tl.constexpr = D + D // 16
    group_G = first // GROUP + tl.arange(0, C // GROUP)
    lane_I = tl.arange(0, GROUP)
    start_R = row_R.to(tl.int64) * record
    wanted_RG = wanted_R[:, None] & (group_G * GROUP < D)[None, :]
    at_RGI = (start_R[:, None] + (group_G * GROUP)[None, :])[:, :, None] + lane_I[None, None, :]
    q_RGI = tl.load(w_OB.to(tl.pointer_type(tl.int8)) + at_RGI, mask=wanted_RG[:, :, None], other=0)
    halves = w_OB.to(tl.pointer_type(tl.float16))
    at_RG = ((start_R + D) // 2)[:, None] + group_G[None, :]
    scale_RG = tl.load(halves + at_RG, mask=wanted_RG, other=0).to(tl.float32)
    tile_RGI = q_RGI.to(tl.float32) * scale_RG[:, :, None]
    return tl.reshape(tile_RGI, (row_R.shape[0], C))


@triton.jit
def _load_nibbles(w_OB, row_R, wanted_R, first, D: tl.constexpr, C: tl.constexpr):
    """scale * q + least. Byte i of a group holds column i low and column i + 16 high; a record is
    D / 2 such bytes, D / 32 fp16 scales and as many least values."""
    record: tl.constexpr = D // 2 + D // 8
    group_G = first // GROUP + tl.arange(0, C // GROUP)
    lane_I = tl.arange(0, HALF)
    start_R = row_R.to(tl.int64) * record
    wanted_RG = wanted_R[:, None] & (group_G * GROUP < D)[None, :]
    at_RGI = (start_R[:, None] + (group_G * HALF)[None, :])[:, :, None] + lane_I[None, None, :]
    q_RGI = tl.load(w_OB + at_RGI, mask=wanted_RG[:, :, None], other=0).to(tl.int32)
    halves = w_OB.to(tl.pointer_type(tl.float16))
    at_RG = ((start_R + D // 2) // 2)[:, None] + group_G[None, :]
    scale_RG1 = tl.load(halves + at_RG, mask=wanted_RG, other=0).to(tl.float32)[:, :, None]
    least_RG = tl.load(halves + at_RG + D // GROUP, mask=wanted_RG, other=0)
    least_RG1 = least_RG.to(tl.float32)[:, :, None]
    low_RGI = (q_RGI & 15).to(tl.float32) * scale_RG1 + least_RG1
    high_RGI = (q_RGI >> 4).to(tl.float32) * scale_RG1 + least_RG1
    tile_RG2I = tl.permute(tl.join(low_RGI, high_RGI), (0, 1, 3, 2))
    return tl.reshape(tile_RG2I, (row_R.shape[0], C))


@triton.jit
def in_two_parts(x):
    """fp32 as a sum of two bf16 values, right to 2^-17: what a bf16 product can take."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def rows_times_tokens(
    x_ND, w_OD, row_R, wanted_R, num_tokens,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """product_RN = rows times each token's vector, fp32. N is 1, 2, 4, or 16 for up to so many."""
    if N <= 4:
        product_RN = _times_few(x_ND, w_OD, row_R, wanted_R, num_tokens, D, N, C, BITS)
    else:
        column_C, token_N = tl.arange(0, C), tl.arange(0, N)
        product_RN = tl.zeros((row_R.shape[0], N), dtype=tl.float32)
        for first in range(0, D, C):
            w_RC = load_rows(w_OD, row_R, wanted_R, first, D, C, BITS)
            here_CN = (first + column_C < D)[:, None] & (token_N < num_tokens)[None, :]
            at_CN = token_N[None, :] * D + first + column_C[:, None]
            x_CN = tl.load(x_ND + at_CN, mask=here_CN, other=0)
            product_RN = add_product(product_RN, w_RC, x_CN, BITS)
    return product_RN


@triton.jit
def _times_few(
    x_ND, w_OD, row_R, wanted_R, num_tokens,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Without matrix units, whose tiles would stand nearly empty: a sum a token, a weight read once
    for all of them."""
    column_C = tl.arange(0, C)
    a_RC = tl.zeros((row_R.shape[0], C), dtype=tl.float32)
    b_RC, c_RC, d_RC = a_RC, a_RC, a_RC
    for first in range(0, D, C):
        w_RC = load_rows(w_OD, row_R, wanted_R, first, D, C, BITS).to(tl.float32)
        at_C = first + column_C
        a_RC += w_RC * _token(x_ND, 0, at_C, num_tokens, D)[None, :]
        if N > 1:
            b_RC += w_RC * _token(x_ND, 1, at_C, num_tokens, D)[None, :]
        if N > 2:
            c_RC += w_RC * _token(x_ND, 2, at_C, num_tokens, D)[None, :]
            d_RC += w_RC * _token(x_ND, 3, at_C, num_tokens, D)[None, :]
    return tl.trans(few_sums(a_RC, b_RC, c_RC, d_RC, 1, N))


@triton.jit
def _token(x_ND, n, at_C, num_tokens, D: tl.constexpr):
    is_here_C = (at_C < D) & (at_C * 0 + n < num_tokens)
    return tl.load(x_ND + n * D + at_C, mask=is_here_C, other=0)


@triton.jit
def few_sums(a, b, c, d, axis: tl.constexpr, N: tl.constexpr):
    """The sums of up to four tiles along an axis, one below the other: [N, what is left]."""
    sums = tl.sum(a, axis=axis)[None, :]
    if N > 1:
        token_N1 = tl.arange(0, N)[:, None]
        sums = tl.where(token_N1 == 0, sums, tl.sum(b, axis=axis)[None, :])
        if N > 2:
            sums = tl.where(token_N1 == 2, tl.sum(c, axis=axis)[None, :], sums)
            sums = tl.where(token_N1 == 3, tl.sum(d, axis=axis)[None, :], sums)
    return sums


@triton.jit
def add_product(sum_RN, w_RC, x_CN, BITS: tl.constexpr):
    """sum + w x on the matrix units; x keeps 16 bits of its fp32 fraction, w all of its own."""
    if BITS == 32:
        sum_RN = tl.dot(w_RC, x_CN, sum_RN, input_precision="ieee")
    else:
        high_CN, low_CN = in_two_parts(x_CN)
        if BITS == 16:
            sum_RN = _dot(w_RC, low_CN, sum_RN)
            sum_RN = _dot(w_RC, high_CN, sum_RN)
        else:  # whole numbers times their scales need more than the 8 bits of bf16
            high_RC, low_RC = in_two_parts(w_RC)
            sum_RN = _dot(low_RC, high_CN, sum_RN)
            sum_RN = _dot(high_RC, low_CN, sum_RN)
            sum_RN = _dot(high_RC, high_CN, sum_RN)
    return sum_RN


@triton.jit
def _dot(a, b, sum):
    if IS_INTERPRETED:  # noqa: SIM108
        sum = tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        sum = tl.dot(a, b, sum)
    return sum


@triton.jit
def rank_among(chosen_S):
    """How many of the chosen stand before each, and how many there are."""
    chosen = chosen_S.to(tl.int32)
    return tl.cumsum(chosen, axis=0) - chosen, tl.sum(chosen, axis=0)


@triton.jit
def pick(index_S, chosen_S, rank_S, count, first, R: tl.constexpr):
    """The indices of the chosen with ranks [first, first + R), 0 beyond the last of `count`, and
    which of them there are."""
    slot_R = first + tl.arange(0, R)
    is_it_RS = chosen_S[None, :] & (rank_S[None, :] == slot_R[:, None])
    return tl.sum(tl.where(is_it_RS, index_S[None, :], 0), axis=1), slot_R < count
