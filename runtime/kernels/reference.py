"""The definition of every kernel: torch in fp32, readable as the formula, never optimised.

Dimension key: N tokens, D model width, O outputs of a linear, F neurons, H query heads,
G kv heads, K head width, S cached positions. `down_FD` is stored transposed: a row per neuron.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x_ND: Tensor, w_OD: Tensor) -> Tensor:
    return x_ND.float() @ w_OD.float().T


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_ND = x_ND.float()
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps) * weight_D.float()


def rope(x_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Half-split rotary: element i turns with i + K/2; cos and sin are [N, K / 2]."""
    a, b = x_NHK.float().chunk(2, dim=-1)
    cos, sin = cos_NK[:, None, :], sin_NK[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q_HK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> Tensor:
    """One token's query heads against its S keys and values; H / G query heads share a kv head."""
    heads_per_kv = q_HK.shape[0] // k_GSK.shape[0]
    k_HSK = k_GSK.float().repeat_interleave(heads_per_kv, dim=0)
    v_HSK = v_GSK.float().repeat_interleave(heads_per_kv, dim=0)
    score_HS = torch.einsum("hk,hsk->hs", q_HK.float(), k_HSK) * q_HK.shape[-1] ** -0.5
    return torch.einsum("hs,hsk->hk", score_HS.softmax(-1), v_HSK)


def activations(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, threshold: float) -> Tensor:
    """h_NF = act(gate) * up with FATReLU: act(g) = g if g > threshold else 0."""
    gate_NF = linear(x_ND, gate_FD)
    return torch.where(gate_NF > threshold, gate_NF, 0.0) * linear(x_ND, up_FD)


def select(score_NF: Tensor, threshold: float) -> Tensor:
    return score_NF > threshold


def ffn(
    x_ND: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    threshold: float,
    selected_NF: Tensor | None = None,
) -> Tensor:
    """y_ND of the selected neurons (all of them without a mask)."""
    h_NF = activations(x_ND, gate_FD, up_FD, threshold)
    if selected_NF is not None:
        h_NF = torch.where(selected_NF, h_NF, 0.0)
    return h_NF @ down_FD.float()
