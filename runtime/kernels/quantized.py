"""Weights in 8 or 4 bits: rows of whole numbers in groups of 32 columns, an fp16 scale each.

A row is one record, its scales behind its numbers, so that a neuron that fires costs one stretch of
memory. Vectors are rounded to int8 in the same groups when they are multiplied: sums within a group
are exact whole numbers, so results are the same for any thread count and batch, as with floats.
Dimensions: N tokens, O rows, D columns, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu_ext

Bits = Literal[8, 4]
GROUP = 32  # columns that share a scale
# Rows are dequantised once for many tokens; for fewer, reading them as they are is faster.
MAX_DIRECT_TOKENS = 32


class QuantizedMatrix:
    """A weight matrix [O, D] in 8 or 4 bits; never written to after it was made.

    8 bits: scale * q with scale = largest size / 127. 4 bits: scale * q + least, on the grid of
    least squared error among some that span all or most of a group's range and their refits: 5 bits
    a weight with both fp16 numbers, as GGUF's Q4_1.
    """

    def __init__(self, rows_OB: Tensor, bits: Bits, num_columns: int) -> None:
        """`rows_OB`: uint8, as `of` makes them."""
        self.rows_OB, self.bits = rows_OB, bits
        self.shape = torch.Size((len(rows_OB), num_columns))
        self.native = _cpu_ext.GroupedMatrix(rows_OB, bits, num_columns)

    @classmethod
    def of(
        cls, weight_OD: Tensor, bits: Bits, keep: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> QuantizedMatrix:
        """`weight_OD` (fp32 or bf16), rounded. ValueError: a weight that is not finite.

        `keep` copies the rows to where they shall stay.
        """
        O, D = weight_OD.shape
        rows_OB = torch.empty(O, _cpu_ext.grouped_row_bytes(bits, D), dtype=torch.uint8)
        _cpu_ext.quantize(weight_OD.contiguous(), bits, rows_OB)
        return cls(keep(rows_OB), bits, D)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> QuantizedMatrix:
        """Some of the rows: a view for a slice, a copy for an index tensor."""
        return QuantizedMatrix(self.rows_OB[rows], self.bits, self.shape[1])

    @property
    def nbytes(self) -> int:
        return self.rows_OB.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[O, D] in fp32 or bf16."""
        out_OD = torch.empty(self.shape, dtype=dtype)
        _cpu_ext.dequantize(self.native, 0, out_OD)
        return out_OD

    def to(self, device: torch.device) -> QuantizedMatrix:
        """Itself: it lives on the host only."""
        if device.type != "cpu":
            raise ValueError("weights in 8 or 4 bits are for the host")
        return self

    def float(self) -> Tensor:
        return self.dequantize(torch.float32)

    def linear(self, x_ND: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """y_NO = x W^T, fp32 out: in whole numbers for few tokens, else by products in `dtype`."""
        if len(x_ND) > MAX_DIRECT_TOKENS:
            return F.linear(x_ND.to(dtype), self.dequantize(dtype)).float()
        out_NO = torch.empty(len(x_ND), len(self))
        _cpu_ext.linear(x_ND.float().contiguous(), self.native, out_NO)
        return out_NO


Weight = Tensor | QuantizedMatrix


def native(weight: Weight) -> object:
    """What the compiled kernels take for it."""
    return weight.native if isinstance(weight, QuantizedMatrix) else weight


def side_by_side(
    up_FD: Weight, down_FD: Weight, keep: Callable[[Tensor], Tensor] = lambda rows: rows
) -> tuple[Weight, Weight]:
    """Copies in which row i of one stands right before row i of the other: a neuron that fires
    costs one longer stretch of memory, and what the hardware reads beyond the first is the second.

    `keep` as in QuantizedMatrix.of.
    """
    if isinstance(up_FD, Tensor) and isinstance(down_FD, Tensor):
        up_FD, down_FD = keep(torch.stack((up_FD, down_FD), dim=1)).unbind(1)
        return up_FD, down_FD
    assert isinstance(up_FD, QuantizedMatrix)
    assert isinstance(down_FD, QuantizedMatrix)
    rows = keep(torch.stack((up_FD.rows_OB, down_FD.rows_OB), dim=1)).unbind(1)
    up, down = (QuantizedMatrix(rows_OB, up_FD.bits, up_FD.shape[1]) for rows_OB in rows)
    return up, down


STRIP_ROWS = 16


def strips(packed_FB: Tensor, scale_FC: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 4 bits (predictor.low_bits) as strips of sixteen (csrc/kernels.h): uint8
    [S, C * 256] and fp16 [S, C * 16], the rows that are missing in the last strip zeros."""
    num_rows, C = scale_FC.shape
    missing = -num_rows % STRIP_ROWS
    packed_FB = F.pad(packed_FB, (0, 0, 0, missing))
    scale_FC = F.pad(scale_FC, (0, 0, 0, missing))
    lines = packed_FB.view(-1, STRIP_ROWS, C, 4, 4).permute(0, 2, 3, 1, 4)
    scales = scale_FC.view(-1, STRIP_ROWS, C).transpose(1, 2)
    return lines.flatten(1).contiguous(), scales.flatten(1).contiguous()


def by_hidden_unit(fc2_FR: Tensor, block_size: int) -> Tensor:
    """[B, R, S]: of each block of S neurons, the weights of one hidden unit side by side, so that
    those of a unit that is zero need not be read. Neurons that are missing in the last block are
    zeros."""
    num_neurons, R = fc2_FR.shape
    fc2_FR = F.pad(fc2_FR, (0, 0, 0, -num_neurons % block_size))
    return fc2_FR.view(-1, block_size, R).transpose(1, 2).contiguous()
