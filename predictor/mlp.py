"""The kinds `mlp`, `mlp-int4` and `svd`: Linear(D, R), ReLU, Linear(R, F), one score per neuron.

Both matrices are stored and served in few bits: as int8 rows with one fp32 scale per row, or in 4
bits with one fp16 scale for each 32 columns (low_bits.py).
Dimension key: N tokens, D model width, R predictor rank, F neurons, C groups of columns, B bytes of
a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from predictor.base import Predictor
from predictor.low_bits import (
    GROUP,
    INT8_MAX,
    check_scales,
    in_groups,
    of_groups,
    pack_nibbles,
    rounded_inputs,
    unpack_nibbles,
)


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and fp32 row scales, q * scale nearest to the weight; a zero row has scale 0."""
    weight_OI = weight_OI.detach().to(torch.float32)
    scale_O = weight_OI.abs().amax(dim=1) / INT8_MAX
    safe_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    q_OI = (weight_OI / safe_O[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return q_OI.contiguous(), scale_O.contiguous()


@dataclass(frozen=True)
class MlpPredictor(Predictor):
    """A small network, trained (`mlp`) or made from the gate (`svd`)."""

    TENSORS: ClassVar[dict[str, str]] = {
        "fc1.weight_q": "fc1_q_RD",
        "fc1.scale": "fc1_scale_R",
        "fc1.bias": "bias_R",
        "fc2.weight_q": "fc2_q_FR",
        "fc2.scale": "fc2_scale_F",
        "fc2.bias": "bias_F",
    }
    PER_NEURON: ClassVar[tuple[str, ...]] = ("fc2_q_FR", "fc2_scale_F", "bias_F")

    fc1_q_RD: Tensor  # int8
    fc1_scale_R: Tensor  # fp32
    bias_R: Tensor  # fp32
    fc2_q_FR: Tensor  # int8
    fc2_scale_F: Tensor  # fp32
    bias_F: Tensor  # fp32
    kind: str = field(default="mlp", kw_only=True)

    def __post_init__(self) -> None:
        R, D = self.fc1_q_RD.shape
        F = self.fc2_q_FR.shape[0]
        self._expect(
            {
                "fc1_q_RD": (torch.int8, (R, D)),
                "fc1_scale_R": (torch.float32, (R,)),
                "bias_R": (torch.float32, (R,)),
                "fc2_q_FR": (torch.int8, (F, R)),
                "fc2_scale_F": (torch.float32, (F,)),
                "bias_F": (torch.float32, (F,)),
            }
        )

    @classmethod
    def from_float(
        cls, fc1_RD: Tensor, bias_R: Tensor, fc2_FR: Tensor, bias_F: Tensor, threshold: float = 0.0
    ) -> MlpPredictor:
        """Quantise trained weights; biases stay fp32."""
        fc1_q_RD, fc1_scale_R = quantize_rows(fc1_RD)
        fc2_q_FR, fc2_scale_F = quantize_rows(fc2_FR)
        return cls(
            fc1_q_RD,
            fc1_scale_R,
            bias_R.detach().to(torch.float32).contiguous(),
            fc2_q_FR,
            fc2_scale_F,
            bias_F.detach().to(torch.float32).contiguous(),
            threshold=float(threshold),
        )

    @property
    def rank(self) -> int:
        return int(self.fc1_q_RD.shape[0])

    @property
    def d_model(self) -> int:
        return int(self.fc1_q_RD.shape[1])

    @property
    def num_neurons(self) -> int:
        return int(self.fc2_q_FR.shape[0])

    @property
    def fc1_RD(self) -> Tensor:
        """The first matrix as the fp32 values that int8 rows and scales stand for."""
        return self.fc1_q_RD.to(torch.float32) * self.fc1_scale_R[:, None]

    @property
    def fc2_FR(self) -> Tensor:
        """The second matrix as the fp32 values that int8 rows and scales stand for."""
        return self.fc2_q_FR.to(torch.float32) * self.fc2_scale_F[:, None]

    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF in fp32: relu(x fc1^T + bias_R) fc2^T + bias_F."""
        x_ND = x_ND.to(torch.float32)
        hidden_NR = torch.relu(torch.addmm(self.bias_R, x_ND, self.fc1_RD.T))
        return torch.addmm(self.bias_F, hidden_NR, self.fc2_FR.T)


@dataclass(frozen=True)
class Int4MlpPredictor(Predictor):
    """The same network in 4 bits: 0.56 of the bytes of `MlpPredictor`."""

    TENSORS: ClassVar[dict[str, str]] = {
        "fc1.weight_q": "fc1_packed_RB",
        "fc1.scale": "fc1_scale_RC",
        "fc1.bias": "bias_R",
        "fc2.weight_q": "fc2_packed_FB",
        "fc2.scale": "fc2_scale_FC",
        "fc2.bias": "bias_F",
    }
    PER_NEURON: ClassVar[tuple[str, ...]] = ("fc2_packed_FB", "fc2_scale_FC", "bias_F")

    fc1_packed_RB: Tensor  # uint8, two values each
    fc1_scale_RC: Tensor  # fp16
    bias_R: Tensor  # fp32
    fc2_packed_FB: Tensor  # uint8, two values each
    fc2_scale_FC: Tensor  # fp16
    bias_F: Tensor  # fp32
    kind: str = field(default="mlp-int4", kw_only=True)

    def __post_init__(self) -> None:
        R, F = len(self.fc1_packed_RB), len(self.fc2_packed_FB)
        D = self.d_model
        self._expect(
            {
                "fc1_packed_RB": (torch.uint8, (R, D // 2)),
                "fc1_scale_RC": (torch.float16, (R, D // GROUP)),
                "bias_R": (torch.float32, (R,)),
                "fc2_packed_FB": (torch.uint8, (F, R // 2)),
                "fc2_scale_FC": (torch.float16, (F, R // GROUP)),
                "bias_F": (torch.float32, (F,)),
            }
        )
        if R % GROUP:
            raise ValueError(f"the rank of a `{self.kind}` predictor is a multiple of {GROUP}.")
        check_scales(self.fc1_scale_RC, "the network's first matrix")
        check_scales(self.fc2_scale_FC, "the network's second matrix")

    @classmethod
    def of(cls, mlp: MlpPredictor) -> Int4MlpPredictor:
        """The nearest one; hidden units that are always zero make the rank a multiple of 32.

        ValueError: the width is no multiple of 32.
        """
        if mlp.d_model % GROUP:
            raise ValueError(
                f"a network of width {mlp.d_model} has no copy in 4 bits in groups of {GROUP}"
            )
        missing = -mlp.rank % GROUP
        q_RD, scale_RC = in_groups(functional.pad(mlp.fc1_RD, (0, 0, 0, missing)), 4)
        q_FR, scale_FC = in_groups(functional.pad(mlp.fc2_FR, (0, missing)), 4)
        first = pack_nibbles(q_RD), scale_RC, functional.pad(mlp.bias_R, (0, missing))
        second = pack_nibbles(q_FR), scale_FC, mlp.bias_F
        return cls(*first, *second, threshold=mlp.threshold)

    @property
    def rank(self) -> int:
        return int(self.fc1_packed_RB.shape[0])

    @property
    def d_model(self) -> int:
        return int(self.fc1_scale_RC.shape[1]) * GROUP

    @property
    def num_neurons(self) -> int:
        return int(self.fc2_packed_FB.shape[0])

    @property
    def fc1_RD(self) -> Tensor:
        """The first matrix as the fp32 values that 4 bits and scales stand for."""
        return of_groups(unpack_nibbles(self.fc1_packed_RB), self.fc1_scale_RC)

    @property
    def fc2_FR(self) -> Tensor:
        """The second matrix as the fp32 values that 4 bits and scales stand for."""
        return of_groups(unpack_nibbles(self.fc2_packed_FB), self.fc2_scale_FC)

    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF in fp32, of `rounded_inputs` and of hidden units rounded in the same way."""
        hidden_NR = torch.relu(torch.addmm(self.bias_R, rounded_inputs(x_ND), self.fc1_RD.T))
        return torch.addmm(self.bias_F, rounded_inputs(hidden_NR), self.fc2_FR.T)
