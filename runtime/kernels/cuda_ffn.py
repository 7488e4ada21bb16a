"""The sparse FFN in Triton: two kernels, and the masks stay inside them.

gate_up_kernel    h = act(gate) * up of the selected neurons: output sparsity. A gate row is read
                  only where selected, an up row only where the gate fires for some token.
up_kernel         the same with the gates already known: step 2 of ProSparse's exact operators.
down_kernel       y = h down: input sparsity, step 3. A down row is read only where h != 0 for some
                  token. Splits of the neurons are added up in a fixed order by whichever program
                  ends last, so results do not depend on timing.
A program looks after every P-th neuron: where hot neurons stand together, they are shared out.
Dimension key: N tokens, D model width, F neurons, R rows of a tile, C columns of a tile, S neurons
of one program or split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_rows import add_product, few_sums, load_rows, pick, rank_among, rows_times_tokens

SUMS_AT_ONCE = tl.constexpr(4096)  # of a column block's splits that are on their way together


@triton.jit
def gate_up_kernel(
    x_ND, gate_FD, up_FD, score_NF, score_stride, score_threshold, h_NF, threshold, num_tokens, F,
    D: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BITS: tl.constexpr, IS_SELECTED: tl.constexpr,
):  # fmt: skip
    """Without scores every neuron is selected, and S must be R. A token's scores, fp32 or bytes,
    are a row, `score_stride` from the next token's."""
    neuron_S = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, S)
    token_N = tl.arange(0, N).to(tl.int64)
    is_token_N = token_N < num_tokens
    here_SN = (neuron_S < F)[:, None] & is_token_N[None, :]
    at_SN = token_N[None, :] * F + neuron_S[:, None]
    if IS_SELECTED:
        least = tl.load(score_threshold)
        row_1N = score_NF + token_N[None, :] * score_stride
        score_SN = tl.load(row_1N + neuron_S[:, None], mask=here_SN, other=0).to(tl.float32)
        selected_SN = here_SN & (score_SN > least)
        chosen_S = tl.max(selected_SN.to(tl.int32), axis=1) > 0
        zero_SN = tl.zeros((S, N), dtype=tl.float32)
        tl.store(h_NF + at_SN, zero_SN, mask=here_SN & (chosen_S == 0)[:, None])
        rank_S, count = rank_among(chosen_S)
        first = 0
        while first < count:
            neuron_R, is_here_R = pick(neuron_S, chosen_S, rank_S, count, first, R)
            here_RN = is_here_R[:, None] & is_token_N[None, :]
            score_RN = tl.load(row_1N + neuron_R[:, None], mask=here_RN, other=0).to(tl.float32)
            h_RN = gated_rows(
                x_ND, gate_FD, up_FD, neuron_R, is_here_R, here_RN & (score_RN > least),
                threshold, num_tokens, D, N, C, BITS,
            )  # fmt: skip
            tl.store(h_NF + token_N[None, :] * F + neuron_R[:, None], h_RN, mask=here_RN)
            first += R
    else:
        h_SN = gated_rows(
            x_ND, gate_FD, up_FD, neuron_S, neuron_S < F, here_SN, threshold, num_tokens,
            D, N, C, BITS,
        )  # fmt: skip
        tl.store(h_NF + at_SN, h_SN, mask=here_SN)


@triton.jit
def gated_rows(
    x_ND, gate_FD, up_FD, neuron_R, is_here_R, selected_RN, threshold, num_tokens,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """h_RN of some neurons, zero for tokens that did not select them."""
    gate_RN = rows_times_tokens(x_ND, gate_FD, neuron_R, is_here_R, num_tokens, D, N, C, BITS)
    return times_up(x_ND, up_FD, gate_RN, neuron_R, selected_RN, threshold, num_tokens,
                    D, N, C, BITS)  # fmt: skip


@triton.jit
def times_up(
    x_ND, up_FD, gate_RN, neuron_R, selected_RN, threshold, num_tokens,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    fires_RN = selected_RN & (gate_RN > threshold)
    any_fires_R = tl.max(fires_RN.to(tl.int32), axis=1) > 0
    h_RN = tl.zeros_like(gate_RN)
    if tl.max(any_fires_R.to(tl.int32), axis=0) > 0:
        up_RN = rows_times_tokens(x_ND, up_FD, neuron_R, any_fires_R, num_tokens, D, N, C, BITS)
        h_RN = tl.where(fires_RN, gate_RN * up_RN, 0.0)
    return h_RN


@triton.jit
def up_kernel(
    x_ND, gate_NF, up_FD, h_NF, threshold, num_tokens, F,
    D: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """h_NF from the gates before their activation."""
    neuron_S = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, S)
    token_N = tl.arange(0, N)
    is_token_N = token_N < num_tokens
    here_SN = (neuron_S < F)[:, None] & is_token_N[None, :]
    at_SN = token_N[None, :].to(tl.int64) * F + neuron_S[:, None]
    gate_SN = tl.load(gate_NF + at_SN, mask=here_SN, other=float("-inf")).to(tl.float32)
    fires_S = tl.max((gate_SN > threshold).to(tl.int32), axis=1) > 0
    zero_SN = tl.zeros((S, N), dtype=tl.float32)
    tl.store(h_NF + at_SN, zero_SN, mask=here_SN & (fires_S == 0)[:, None])
    rank_S, count = rank_among(fires_S)
    first = 0
    while first < count:
        neuron_R, is_here_R = pick(neuron_S, fires_S, rank_S, count, first, R)
        here_RN = is_here_R[:, None] & is_token_N[None, :]
        at_RN = token_N[None, :].to(tl.int64) * F + neuron_R[:, None]
        gate_RN = tl.load(gate_NF + at_RN, mask=here_RN, other=0).to(tl.float32)
        up_RN = rows_times_tokens(x_ND, up_FD, neuron_R, is_here_R, num_tokens, D, N, C, BITS)
        h_RN = tl.where(here_RN & (gate_RN > threshold), gate_RN * up_RN, 0.0)
        tl.store(h_NF + at_RN, h_RN, mask=here_RN)
        first += R


@triton.jit
def down_kernel(
    h_NF, down_FD, out_ND, partial, ended, num_tokens, F,
    D: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BITS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits). `partial` [splits, N, D] fp32; `ended` int32, one for each
    column block, zero before and after. With IS_ADDED the result is added to `out_ND`."""
    block, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at_once: tl.constexpr = SUMS_AT_ONCE // C
    token_N = tl.arange(0, N)
    is_token_N = token_N < num_tokens
    column_C = block * C + tl.arange(0, C)
    here_NC = is_token_N[:, None] & (column_C < D)[None, :]
    at_NC = token_N[:, None] * D + column_C[None, :]
    neuron_S = split + num_splits * tl.arange(0, S)
    here_SN = (neuron_S < F)[:, None] & is_token_N[None, :]
    h_SN = tl.load(h_NF + token_N[None, :].to(tl.int64) * F + neuron_S[:, None], mask=here_SN,
                   other=0)  # fmt: skip
    fires_S = tl.max((h_SN != 0).to(tl.int32), axis=1) > 0
    rank_S, count = rank_among(fires_S)
    first = 0
    if N <= 4:
        a_RC = tl.zeros((R, C), dtype=tl.float32)
        b_RC, c_RC, d_RC = a_RC, a_RC, a_RC
        while first < count:
            neuron_R, is_here_R = pick(neuron_S, fires_S, rank_S, count, first, R)
            down_RC = load_rows(down_FD, neuron_R, is_here_R, block * C, D, C, BITS)
            down_RC = down_RC.to(tl.float32)
            a_RC += down_RC * _token(h_NF, 0, neuron_R, is_here_R, num_tokens, F)[:, None]
            if N > 1:
                b_RC += down_RC * _token(h_NF, 1, neuron_R, is_here_R, num_tokens, F)[:, None]
            if N > 2:
                c_RC += down_RC * _token(h_NF, 2, neuron_R, is_here_R, num_tokens, F)[:, None]
                d_RC += down_RC * _token(h_NF, 3, neuron_R, is_here_R, num_tokens, F)[:, None]
            first += R
        sum_NC = few_sums(a_RC, b_RC, c_RC, d_RC, 0, N)
    else:
        sum_CN = tl.zeros((C, N), dtype=tl.float32)
        while first < count:
            neuron_R, is_here_R = pick(neuron_S, fires_S, rank_S, count, first, R)
            at_RN = token_N[None, :].to(tl.int64) * F + neuron_R[:, None]
            h_RN = tl.load(h_NF + at_RN, mask=is_here_R[:, None] & is_token_N[None, :], other=0)
            down_RC = load_rows(down_FD, neuron_R, is_here_R, block * C, D, C, BITS)
            sum_CN = add_product(sum_CN, tl.trans(down_RC), h_RN, BITS)
            first += R
        sum_NC = tl.trans(sum_CN)
    step = num_tokens * D
    tl.store(partial + split * step + at_NC, sum_NC, mask=here_NC)
    tl.debug_barrier()  # all of this program's sums are written before it says so
    if tl.atomic_add(ended + block, 1, sem="acq_rel") == num_splits - 1:
        is_here_C = column_C < D
        for n in range(0, num_tokens):
            total_C = tl.zeros((C,), dtype=tl.float32)
            for other in range(0, num_splits, at_once):
                split_U = other + tl.arange(0, at_once)
                here_UC = (split_U < num_splits)[:, None] & is_here_C[None, :]
                at_UC = (split_U * step + n * D)[:, None] + column_C[None, :]
                part_UC = tl.load(partial + at_UC, mask=here_UC, other=0, cache_modifier=".cg")
                total_C += tl.sum(part_UC, axis=0)
            at_C = n * D + column_C
            if IS_ADDED:
                total_C += tl.load(out_ND + at_C, mask=is_here_C, other=0)
            tl.store(out_ND + at_C, total_C, mask=is_here_C)
        tl.store(ended + block, 0)


@triton.jit
def _token(h_NF, n, neuron_R, is_here_R, num_tokens, F):
    is_here_R = is_here_R & (neuron_R * 0 + n < num_tokens)
    return tl.load(h_NF + n * F + neuron_R, mask=is_here_R, other=0)
