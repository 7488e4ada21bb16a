"""Decoding of many rows in lock-step: how the dense model writes its corpus (corpus.py).

Dimension key: B rows, S positions, D model width, G kv heads, g query heads of one, K head width,
V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling import Llama, gated, project, rms_norm, rope_tables, split_heads


class DecodeCache:
    """Keys and values of rows that advance in lock-step (all rows have the same length)."""

    def __init__(self, model: Llama, batch: int, max_length: int) -> None:
        s = model.shape
        size = (s.num_layers, batch, s.num_kv_heads, max_length, s.head_width)
        self.k = torch.empty(size, dtype=model.embed_VD.dtype, device=model.device)
        self.v = torch.empty_like(self.k)
        self.length = 0
        self.cos, self.sin = rope_tables(s, max_length, model.device)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


@torch.no_grad()
def decode_step(model: Llama, cache: DecodeCache, ids_B: Tensor) -> Tensor:
    """Append one token to every row; next-token logits [B, V] in the weight dtype."""
    shape, position = model.shape, cache.length
    groups = shape.num_heads // shape.num_kv_heads
    cos, sin = cache.cos[position : position + 1], cache.sin[position : position + 1]
    x_BSD = model.embed_VD[ids_B].unsqueeze(1)
    batch = x_BSD.shape[0]
    for layer, w in enumerate(model.blocks):
        qkv = project(rms_norm(x_BSD, w.norm1_D, shape.norm_eps), w.qkv_OD)
        q, k, v = split_heads(qkv, shape, cos, sin)
        cache.k[layer, :batch, :, position] = k[:, :, 0]
        cache.v[layer, :batch, :, position] = v[:, :, 0]
        # the query heads of one kv group take the place of positions: GQA without copying keys
        q_BGgK = q.view(batch, shape.num_kv_heads, groups, shape.head_width)
        keys = cache.k[layer, :batch, :, : position + 1]
        values = cache.v[layer, :batch, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q_BGgK, keys, values)
        x_BSD = x_BSD + project(mixed.reshape(batch, 1, -1), w.out_DO)
        h_BSF = gated(x_BSD, w, shape.norm_eps, shape.hidden_act, model.threshold_L[layer])
        x_BSD = x_BSD + project(h_BSF, w.down_DF)
    cache.length += 1
    last_BD = rms_norm(x_BSD[:, 0], model.final_norm_D, shape.norm_eps)
    return F.linear(last_BD, model.embed_VD)
