"""Torch operations of the model on any device: prompts everywhere, decode where no C++ kernel runs.

Residuals, norms and returned values are fp32; products run in the dtype of the weights.
Dimensions: N tokens, D model width, O outputs, H query heads, G kv heads, K head width,
S positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ModelConfig, RopeConfig
from .kv_cache import SequenceCache

if TYPE_CHECKING:  # the extension may not be built
    from .kernels.quantized import Weight

FP32_BLOCK_ROWS = 8192  # of a weight that is widened for linear_fp32


def linear(x_ND: Tensor, weight_OD: Weight) -> Tensor:
    """y_NO = x W^T, fp32 out, computed where the weight lies."""
    if not isinstance(weight_OD, Tensor):
        return weight_OD.linear(x_ND)
    x = x_ND.to(weight_OD.device, weight_OD.dtype)
    return F.linear(x, weight_OD).float().to(x_ND.device)


def linear_fp32(x_ND: Tensor, weight_OD: Weight) -> Tensor:
    """y_NO in fp32 arithmetic, whatever the weights' dtype; they are widened a block at a time."""
    if not isinstance(weight_OD, Tensor):
        return F.linear(x_ND, weight_OD.float())
    if weight_OD.dtype == torch.float32:
        return F.linear(x_ND, weight_OD)
    if weight_OD.is_cuda:
        return _linear_of_halves(x_ND, weight_OD)
    blocks = torch.split(weight_OD, FP32_BLOCK_ROWS)
    return torch.cat([F.linear(x_ND, block.float()) for block in blocks], dim=1)


def _linear_of_halves(x_ND: Tensor, weight_OD: Tensor) -> Tensor:
    """y_NO in fp32 without a widened copy of the bf16 weights: x as the sum of two bf16 vectors,
    which leaves 16 of its 24 bits, in products that add up in fp32."""
    high_ND = x_ND.to(weight_OD.dtype)
    low_ND = (x_ND - high_ND).to(weight_OD.dtype)
    y_NO = torch.mm(torch.cat((high_ND, low_ND)), weight_OD.t(), out_dtype=torch.float32)
    return y_NO[: len(x_ND)] + y_NO[len(x_ND) :]


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps) * weight_D.to(x_ND.device)


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each [S, K/2], fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        frequency = frequency / rope.params["factor"]
    elif rope.kind == "llama3":
        frequency = _llama3_frequency(frequency, rope.params)
    angle_SK = torch.outer(torch.arange(num_positions).float(), frequency)
    return angle_SK.cos(), angle_SK.sin()


def _llama3_frequency(frequency: Tensor, params: dict[str, float]) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    context = params["original_max_position_embeddings"]
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    slowed = frequency / params["factor"]
    share = (context / wavelength - low) / (high - low)
    blended = (1 - share) * slowed + share * frequency
    result = torch.where(wavelength > context / low, slowed, blended)
    return torch.where(wavelength < context / high, frequency, result)


def apply_rope(x_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head; cos and sin are [N, K/2]."""
    first, second = x_NHK.chunk(2, dim=-1)
    cos, sin = cos_NK[:, None], sin_NK[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_heads(qkv_NO: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection's rows are q heads, then k heads, then v heads."""
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    heads = qkv_NO.view(len(qkv_NO), H + 2 * G, K)
    return heads[:, :H], heads[:, H : H + G], heads[:, H + G :]


def attention_prefill(q_NHK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> Tensor:
    """Causal attention of the last N of S positions; returns [N, H*K] in the dtype of q."""
    N, S = len(q_NHK), k_GSK.shape[1]
    repeats = q_NHK.shape[1] // len(k_GSK)
    seen_NS = None
    if N < S:
        seen_NS = torch.ones(N, S, dtype=torch.bool, device=q_NHK.device).tril(S - N)
    out_HNK = F.scaled_dot_product_attention(
        q_NHK.transpose(0, 1)[None],
        k_GSK.repeat_interleave(repeats, dim=0)[None],
        v_GSK.repeat_interleave(repeats, dim=0)[None],
        attn_mask=seen_NS,
        is_causal=seen_NS is None,
    )[0]
    return out_HNK.transpose(0, 1).reshape(N, -1)


def attention_decode(q_HK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> Tensor:
    """One token of one sequence over its cached positions, fp32; returns [H*K]."""
    H, K = q_HK.shape
    q_GRK = q_HK.view(k_GSK.shape[0], -1, K).float()
    score_GRS = q_GRK @ k_GSK.float().transpose(1, 2) / math.sqrt(K)
    return torch.matmul(score_GRS.softmax(-1), v_GSK.float()).reshape(H * K)


class CacheBatch:
    """Where the keys and values of this step's tokens live: one cache each."""

    def __init__(self, caches: Sequence[SequenceCache], tables: tuple[Tensor, Tensor]) -> None:
        self._caches, self._lengths = caches, [cache.length for cache in caches]
        position_N = torch.tensor(self._lengths, device=tables[0].device)
        self.cos_NK, self.sin_NK = tables[0][position_N], tables[1][position_N]

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Write one position of each cache, then attend: [N, H*K], fp32."""
        dtype = self._caches[0].dtype
        k_NGK, v_NGK = k_NGK.to(dtype), v_NGK.to(dtype)
        rows = []
        for n, (cache, length) in enumerate(zip(self._caches, self._lengths, strict=True)):
            cache.write(layer, length, k_NGK[n : n + 1], v_NGK[n : n + 1])
            rows.append(attention_decode(q_NHK[n], *cache.read(layer, length + 1)))
        return torch.stack(rows)


class TorchAttention:
    """One layer's decode attention block in torch; `kernels.cpu.CpuAttention` is the same in C++.

    Every position of a sequence's cache below `length` is filled; the caller advances `length`.
    """

    def __init__(
        self, layer: int, norm_D: Tensor, qkv_OD: Weight, out_DO: Weight, config: ModelConfig
    ) -> None:
        self._layer, self._config = layer, config
        self._norm_D, self._qkv_OD, self._out_DO = norm_D, qkv_OD, out_DO

    def forward(self, x_ND: Tensor, kv: CacheBatch) -> None:
        """x += attention(rms_norm(x)), in place; appends one key and value to each cache."""
        normed_ND = rms_norm(x_ND, self._norm_D, self._config.rms_eps)
        q_NHK, k_NGK, v_NGK = split_heads(linear(normed_ND, self._qkv_OD), self._config)
        q_NHK = apply_rope(q_NHK, kv.cos_NK, kv.sin_NK)
        k_NGK = apply_rope(k_NGK, kv.cos_NK, kv.sin_NK)
        x_ND += linear(kv.attend(self._layer, q_NHK, k_NGK, v_NGK), self._out_DO)


def argmax(logits_NV: Tensor) -> Tensor:
    """ids_N of each row's largest; of several the first, and a NaN before all numbers.

    On the host by numpy, which is many times as fast there: torch's takes a thirtieth of a small
    model's step.
    """
    if logits_NV.device.type != "cpu":
        return logits_NV.argmax(-1)
    return torch.from_numpy(logits_NV.numpy().argmax(-1))
