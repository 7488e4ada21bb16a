"""Predictors that need no training: what the gate's own weights say about it, for fewer bytes.

All kinds, the trained `MlpPredictor` among them, are one thing to whoever compares or calibrates
them: a `Scorer`. A neuron's score rises with the chance that it fires; zero is the untuned guess.

| kind | stores | source |
|---|---|---|
| `mlp` | two int8 matrices, trained | predictor/mlp.py |
| `svd` | the same two matrices, from the gate and the inputs' covariance | SVDP (whitening, bias) |
| `gate-int8`, `gate-int4` | the gate in low bits, groups of 32 columns | proxy weights (Prox) |
| `sign` | one bit per gate weight | SparseInfer |

Dimension key: N tokens, D model width, R predictor rank, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from predictor.mlp import MlpPredictor

OPEN_SHIFT = 4.0  # standard deviations by which the hidden units of `svd` stay above zero
GROUP = 32  # columns that share a scale in a low-bit gate


class Scorer(Protocol):
    """Says from an FFN's input which of its neurons may fire."""

    @property
    def num_bytes(self) -> int:
        """What one token has to read."""
        ...

    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF in fp32."""
        ...


def whitening(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean_D, and the square root of the inputs' covariance and its inverse, both [D, D], fp64."""
    x_ND = x_ND.double()
    mean_D = x_ND.mean(0)
    centred_ND = x_ND - mean_D
    covariance_DD = centred_ND.T @ centred_ND / len(x_ND)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    # A floor keeps directions without variance in the sample from being blown up by noise.
    values_D = values_D.clamp(min=1e-4 * float(values_D.mean()))
    root_DD = (vectors_DD * values_D.sqrt()) @ vectors_DD.T
    inverse_DD = (vectors_DD / values_D.sqrt()) @ vectors_DD.T
    return mean_D, root_DD, inverse_DD


def svd_predictor(
    gate_FD: Tensor, x_ND: Tensor, rank: int, activation_threshold: float
) -> MlpPredictor:
    """The best rank-R guess of the gate over these inputs, as an MLP whose ReLU stays open.

    Minimises the mean of ||(G - G_R)(x - mean)||^2 over `x_ND`: an SVD of the gate times the
    root of the inputs' covariance. A neuron's score is its guessed distance above the activation
    threshold, in standard deviations of what the guess misses, so that one threshold on scores
    suits all neurons.
    """
    gate_FD = gate_FD.double()
    mean_D, root_DD, inverse_DD = whitening(x_ND)
    left_FK, sizes_K, right_KD = torch.linalg.svd(gate_FD @ root_DD, full_matrices=False)
    missed_F = (left_FK[:, rank:] * sizes_K[rank:]).square().sum(1).sqrt()
    # a neuron that the guess catches whole still gets a finite score
    missed_F = missed_F.clamp(min=0.02 * float(missed_F.mean()) + 1e-12)[:, None]
    fc1_RD = right_KD[:rank] @ inverse_DD  # each hidden unit has variance 1
    fc2_FR = left_FK[:, :rank] * sizes_K[:rank] / missed_F
    bias_R = OPEN_SHIFT - fc1_RD @ mean_D
    centre_F = (gate_FD @ mean_D - activation_threshold) / missed_F[:, 0]
    return MlpPredictor.from_float(fc1_RD, bias_R, fc2_FR, centre_F - OPEN_SHIFT * fc2_FR.sum(1))


@dataclass(frozen=True)
class GateCopy:
    """The gate in `bits` bits, with one fp16 scale for each GROUP columns of a row."""

    q_FD: Tensor  # int8 values, of which `bits` bits count
    scale_FC: Tensor  # fp16, C groups
    bits: int
    activation_threshold: float

    @classmethod
    def of(cls, gate_FD: Tensor, bits: int, activation_threshold: float) -> GateCopy:
        num_neurons, width = gate_FD.shape
        if width % GROUP or not 2 <= bits <= 8:
            raise ValueError(f"a gate of width {width} has no {bits}-bit copy in groups of {GROUP}")
        groups_FCG = gate_FD.float().view(num_neurons, -1, GROUP)
        largest = 2 ** (bits - 1) - 1
        scale_FC = (groups_FCG.abs().amax(-1) / largest).half()
        safe_FC1 = scale_FC.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
        q_FCG = (groups_FCG / safe_FC1).round().clamp(-largest, largest).to(torch.int8)
        return cls(q_FCG.view(num_neurons, width), scale_FC, bits, activation_threshold)

    @property
    def num_bytes(self) -> int:
        return self.q_FD.numel() * self.bits // 8 + self.scale_FC.numel() * 2

    def score(self, x_ND: Tensor) -> Tensor:
        """The gate that the copy gives, above the activation threshold."""
        num_neurons, width = self.q_FD.shape
        groups_FCG = self.q_FD.float().view(num_neurons, -1, GROUP)
        copy_FD = (groups_FCG * self.scale_FC.float()[..., None]).view(num_neurons, width)
        return x_ND.float() @ copy_FD.T - self.activation_threshold


@dataclass(frozen=True)
class SignGate:
    """One bit per gate weight: how many signs of x and of the row agree, less how many do not."""

    sign_FD: Tensor  # int8, -1 or 1

    @classmethod
    def of(cls, gate_FD: Tensor) -> SignGate:
        return cls(torch.where(gate_FD > 0, 1, -1).to(torch.int8))

    @property
    def num_bytes(self) -> int:
        return self.sign_FD.numel() // 8

    def score(self, x_ND: Tensor) -> Tensor:
        sign_ND = torch.where(x_ND > 0, 1.0, -1.0)
        return sign_ND @ self.sign_FD.float().T
