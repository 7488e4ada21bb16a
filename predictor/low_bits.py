"""Weights of predictors in 8 or 4 bits, one fp16 scale for each GROUP columns of a row, and vectors
rounded as they are scored with such weights.

Dimension key: N tokens, D columns, O rows, C groups of columns, G columns of a group, B bytes of a
row.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # columns that share a scale
INT8_MAX = 127


def in_groups(weight_OD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 q_OD and fp16 scale_OC: q * scale is nearest to the weight, |q| < 2^(bits - 1)."""
    groups_OCG = weight_OD.float().reshape(len(weight_OD), -1, GROUP)
    largest = 2 ** (bits - 1) - 1
    scale_OC = (groups_OCG.abs().amax(-1) / largest).half()
    safe_OC1 = torch.where(scale_OC > 0, scale_OC, 1).float()[..., None]
    q_OCG = (groups_OCG / safe_OC1).round().clamp(-largest, largest).to(torch.int8)
    return q_OCG.flatten(1), scale_OC


def of_groups(q_OD: Tensor, scale_OC: Tensor) -> Tensor:
    """The fp32 weights that they stand for."""
    return q_OD.float() * scale_OC.float().repeat_interleave(GROUP, dim=1)


def rounded_inputs(x_ND: Tensor) -> Tensor:
    """x as weights in few bits see it: in groups of GROUP columns, int8 times an fp32 scale each.

    Products are then sums of whole numbers. Halves round to even.
    """
    groups_NCG = x_ND.float().reshape(len(x_ND), -1, GROUP)
    scale_NC1 = (groups_NCG.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    rounded_NCG = (groups_NCG / scale_NC1).round() * scale_NC1
    return rounded_NCG.flatten(1)


def pack_nibbles(q_OD: Tensor) -> Tensor:
    """int8 values in [-8, 7] -> uint8, two per byte, each plus 8.

    Byte i of a group holds its column i in the low half and column i + GROUP / 2 in the high one.
    """
    low_OCB, high_OCB = (q_OD + 8).to(torch.uint8).view(len(q_OD), -1, 2, GROUP // 2).unbind(2)
    return (low_OCB | (high_OCB << 4)).flatten(1).contiguous()


def unpack_nibbles(packed_OB: Tensor) -> Tensor:
    """The reverse of pack_nibbles."""
    packed_OCB = packed_OB.view(len(packed_OB), -1, GROUP // 2)
    both_OC2B = torch.stack((packed_OCB & 15, packed_OCB >> 4), dim=2)
    q_OD: Tensor = both_OC2B.flatten(1).to(torch.int8) - 8
    return q_OD


def check_scales(scale_OC: Tensor, of: str) -> None:
    """Raises ValueError for scales that no weights have."""
    if not bool((scale_OC.isfinite() & (scale_OC >= 0)).all()):
        raise ValueError(f"a scale of {of} is negative or not finite.")
