"""One layer's predictor: Linear(D, R), ReLU, Linear(R, F), one score per neuron.

Both matrices are stored and served as int8 rows with one fp32 scale per row. `score` is the
definition that every faster implementation is held to.
Dimension key: N tokens, D model width, R predictor rank, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

INT8_MAX = 127


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and fp32 row scales, q * scale nearest to the weight; a zero row has scale 0."""
    weight_OI = weight_OI.detach().to(torch.float32)
    scale_O = weight_OI.abs().amax(dim=1) / INT8_MAX
    safe_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    q_OI = (weight_OI / safe_O[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return q_OI.contiguous(), scale_O.contiguous()


@dataclass(frozen=True)
class MlpPredictor:
    """Says which neurons of one layer may fire, from the vector that the layer's FFN gets."""

    fc1_q_RD: Tensor  # int8
    fc1_scale_R: Tensor  # fp32
    bias_R: Tensor  # fp32
    fc2_q_FR: Tensor  # int8
    fc2_scale_F: Tensor  # fp32
    bias_F: Tensor  # fp32
    threshold: float  # a neuron is selected where its score is above; one per layer

    def __post_init__(self) -> None:
        R, D = self.fc1_q_RD.shape
        F, R2 = self.fc2_q_FR.shape
        expected = {
            "fc1_q_RD": (torch.int8, (R, D)),
            "fc1_scale_R": (torch.float32, (R,)),
            "bias_R": (torch.float32, (R,)),
            "fc2_q_FR": (torch.int8, (F, R)),
            "fc2_scale_F": (torch.float32, (F,)),
            "bias_F": (torch.float32, (F,)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {dtype} of shape {shape}, "
                    f"is {tensor.dtype} of shape {tuple(tensor.shape)} (rank {R} or {R2})."
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
            float(threshold),
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

    @property
    def num_bytes(self) -> int:
        """What one token has to read: both int8 matrices, scales and biases."""
        tensors = (
            self.fc1_q_RD,
            self.fc1_scale_R,
            self.bias_R,
            self.fc2_q_FR,
            self.fc2_scale_F,
            self.bias_F,
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF in fp32: relu(x fc1^T + bias_R) fc2^T + bias_F."""
        x_ND = x_ND.to(torch.float32)
        hidden_NR = torch.relu(torch.addmm(self.bias_R, x_ND, self.fc1_RD.T))
        return torch.addmm(self.bias_F, hidden_NR, self.fc2_FR.T)

    def select(self, x_ND: Tensor) -> Tensor:
        """mask_NF: the neurons to look at. A NaN score selects nothing."""
        return self.score(x_ND) > self.threshold

    def permuted(self, order_F: Tensor) -> MlpPredictor:
        """The same predictor for a layer whose neuron i is the old neuron order_F[i]."""
        if not torch.equal(order_F.sort().values.cpu(), torch.arange(self.num_neurons)):
            raise ValueError(f"order_F must be a permutation of {self.num_neurons} neurons.")
        return replace(
            self,
            fc2_q_FR=self.fc2_q_FR[order_F].contiguous(),
            fc2_scale_F=self.fc2_scale_F[order_F].contiguous(),
            bias_F=self.bias_F[order_F].contiguous(),
        )

    def with_threshold(self, threshold: float) -> MlpPredictor:
        return replace(self, threshold=float(threshold))

    def to(self, device: torch.device | str) -> MlpPredictor:
        """The same predictor with its tensors on `device`."""
        return replace(
            self,
            fc1_q_RD=self.fc1_q_RD.to(device),
            fc1_scale_R=self.fc1_scale_R.to(device),
            bias_R=self.bias_R.to(device),
            fc2_q_FR=self.fc2_q_FR.to(device),
            fc2_scale_F=self.fc2_scale_F.to(device),
            bias_F=self.bias_F.to(device),
        )
