"""One layer's attention block by the Triton kernels, and where its keys and values live.

Dimension key: N tokens, D model width, H query heads, G kv heads, K head width, S positions,
L layers, C = (H + 2 G) K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda import MAX_TOKENS, Rows, project, rms_norm
from .cuda_attention import attention_kernel, rope_append_kernel

if TYPE_CHECKING:  # the extension may not be built
    from .quantized import Weight

KV_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
TILE_ELEMENTS = 4096  # query heads x positions x head width that a program holds at a time
MAX_SPLITS = 16
ENOUGH_PROGRAMS = 256  # of one token's attention, to fill a large GPU


@dataclass(frozen=True)
class KvBatch:
    """Where the keys and values of this step's tokens live, int64, on the device.

    Token n is at position `table_3N[2, n]` of a sequence whose keys and values are in a pool
    [B, L, 2, G, T, K] at address `table_3N[0, n]`, a multiple of 16, in the blocks that the int64
    at address `table_3N[1, n]` and those behind it name. The caller keeps pools and tables alive,
    and has no two tokens of one sequence in a step.
    """

    table_3N: Tensor
    num_layers: int
    block_size: int

    @classmethod
    def of(
        cls, pools: Sequence[Tensor], tables: Sequence[Tensor], positions: Sequence[int]
    ) -> KvBatch:
        """Pools are of one shape but for their blocks; tables are on their device."""
        L, T = pools[0].shape[1], pools[0].shape[4]
        return cls(kv_table(pools, tables, positions).to(pools[0].device), L, T)

    def __len__(self) -> int:
        return self.table_3N.shape[1]


def kv_table(pools: Sequence[Tensor], tables: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """The rows of `KvBatch.table_3N`, on the host."""
    return torch.tensor(
        [[p.data_ptr() for p in pools], [t.data_ptr() for t in tables], list(positions)]
    )


class AttentionBuffers:
    """What splits of the positions leave for the last of them to join; shared by a model's layers,
    which run one after the other."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device):
        self.Q = triton.next_power_of_2(num_heads // num_kv_heads)
        self.W = triton.next_power_of_2(head_dim)
        self.B = max(1, min(64, TILE_ELEMENTS // (self.Q * self.W)))
        self.num_splits = min(MAX_SPLITS, max(1, ENOUGH_PROGRAMS // num_kv_heads))
        pairs = MAX_TOKENS * num_kv_heads
        parts = pairs * self.num_splits * self.Q
        self.partial = torch.empty(parts * self.W, device=device)
        self.partial_max = torch.empty(parts, device=device)
        self.partial_sum = torch.empty(parts, device=device)
        self.ended = torch.zeros(pairs, dtype=torch.int32, device=device)


class CudaAttention:
    """x += attention(rms_norm(x) qkv^T) o^T, in place; as kernels.cpu.CpuAttention.

    `cos_SK`, `sin_SK`: fp32 [max positions, K / 2]. `dtype` is that of the pools.
    """

    def __init__(
        self,
        layer: int,
        norm_D: Tensor,
        qkv_CD: Weight,
        o_DC: Weight,
        cos_SK: Tensor,
        sin_SK: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        dtype: torch.dtype,
        buffers: AttentionBuffers,
    ) -> None:
        device = norm_D.device
        self._layer, self._norm_D, self._eps = layer, norm_D, eps
        self._qkv, self._o = Rows.of(qkv_CD, device), Rows.of(o_DC, device)
        self._tables = cos_SK, sin_SK
        self._H, self._G, self._K = num_heads, num_kv_heads, 2 * cos_SK.shape[1]
        self._kv_type, self._buffers = KV_TYPES[dtype], buffers

    def forward(self, x_ND: Tensor, kv: KvBatch) -> None:
        qkv_NC = project(rms_norm(x_ND, self._norm_D, self._eps), self._qkv)
        project(self.attend(qkv_NC, kv), self._o, add_to=x_ND)

    def attend(self, qkv_NC: Tensor, kv: KvBatch) -> Tensor:
        """Rotates q and k, writes k and v, attends: out_N(HK), fp32."""
        out_NHK = qkv_NC.new_empty(len(qkv_NC), self._H * self._K)
        for first in range(0, len(qkv_NC), MAX_TOKENS):
            part = slice(first, first + MAX_TOKENS)
            self._attend(out_NHK[part], qkv_NC[part], kv.table_3N[:, part], kv)
        return out_NHK

    def _attend(self, out_NHK: Tensor, qkv_NC: Tensor, table_3N: Tensor, kv: KvBatch) -> None:
        """What the buffers have room for."""
        N, H, G, K, b = len(qkv_NC), self._H, self._G, self._K, self._buffers
        L, T = kv.num_layers, kv.block_size
        q_NHK = torch.empty_like(out_NHK)
        where = table_3N[0], table_3N[1], table_3N[2]
        rope_append_kernel[(N, H + 2 * G)](
            qkv_NC, q_NHK, *self._tables, *where, self._layer,
            L, H, G, T, K, triton.next_power_of_2(K // 2), self._kv_type, num_warps=1,
        )  # fmt: skip
        attention_kernel[(N * G, b.num_splits)](
            q_NHK, out_NHK, *where, self._layer, K**-0.5,
            b.partial, b.partial_max, b.partial_sum, b.ended,
            L, H, G, T, K, b.W, b.Q, b.B, b.num_splits, self._kv_type, num_warps=4,
        )  # fmt: skip
