"""Rows times a few tokens, and the norm before them, in Triton: what predictors and decode need.

Dimension key: N tokens, D columns, O rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_rows import GROUP, rows_times_tokens


@triton.jit
def linear_kernel(
    x_ND, w_OD, scale_O, bias_O, y_NO, num_tokens, O,
    D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_RELU: tl.constexpr,
    IS_ADDED: tl.constexpr,
):  # fmt: skip
    """y = act(x w^T * scale + bias), fp32; with IS_ADDED, y += it."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    token_N = tl.arange(0, N)
    is_row_R = row_R < O
    y_RN = rows_times_tokens(x_ND, w_OD, row_R, is_row_R, num_tokens, D, N, C, BITS)
    if HAS_SCALE:
        y_RN *= tl.load(scale_O + row_R, mask=is_row_R, other=0)[:, None]
    if HAS_BIAS:
        y_RN += tl.load(bias_O + row_R, mask=is_row_R, other=0)[:, None]
    if IS_RELU:
        y_RN = tl.maximum(y_RN, 0.0)
    at_RN = token_N[None, :].to(tl.int64) * O + row_R[:, None]
    here_RN = is_row_R[:, None] & (token_N < num_tokens)[None, :]
    if IS_ADDED:
        y_RN += tl.load(y_NO + at_RN, mask=here_RN, other=0)
    tl.store(y_NO + at_RN, y_RN, mask=here_RN)


@triton.jit
def rms_norm_kernel(x_ND, weight_D, y_ND, eps, D: tl.constexpr, C: tl.constexpr):
    """One program for each token; C >= D."""
    column_C = tl.arange(0, C)
    row = tl.program_id(0) * D
    x_C = tl.load(x_ND + row + column_C, mask=column_C < D, other=0)
    weight_C = tl.load(weight_D + column_C, mask=column_C < D, other=0)
    scale = tl.rsqrt(tl.sum(x_C * x_C, axis=0) / D + eps)
    y_C = x_C * scale * weight_C
    tl.store(y_ND + row + column_C, y_C.to(y_ND.dtype.element_ty), mask=column_C < D)


@triton.jit
def activate_kernel(gate, up, h, threshold, size, C: tl.constexpr):
    """h = act(gate) * up, element by element: what stands between dense products."""
    at_C = tl.program_id(0) * C + tl.arange(0, C)
    gate_C = tl.load(gate + at_C, mask=at_C < size, other=0).to(tl.float32)
    up_C = tl.load(up + at_C, mask=at_C < size, other=0).to(tl.float32)
    h_C = tl.where(gate_C > threshold, gate_C * up_C, 0.0)
    tl.store(h + at_C, h_C.to(h.dtype.element_ty), mask=at_C < size)


@triton.jit
def round_inputs_kernel(x_ND, y_ND, D: tl.constexpr, C: tl.constexpr):
    """predictor.low_bits.rounded_inputs: whole numbers up to 127 times a scale for each group.

    One program for each token; C >= D. Adding and taking away 1.5 * 2^23 rounds halves to even.
    """
    group_G = tl.arange(0, C // GROUP)
    at_GI = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = tl.program_id(0) * D
    x_GI = tl.load(x_ND + row + at_GI, mask=at_GI < D, other=0)
    largest_G = tl.max(tl.abs(x_GI), axis=1)
    scale_G1 = tl.maximum(tl.div_rn(largest_G, 127.0), 1.1754943508222875e-38)[:, None]
    whole_GI = tl.div_rn(x_GI, scale_G1 + tl.zeros_like(x_GI)) + 12582912.0 - 12582912.0
    tl.store(y_ND + row + at_GI, whole_GI * scale_G1, mask=at_GI < D)
