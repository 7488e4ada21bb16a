"""The kinds of predictors; those made here need no training: the gate's own weights say enough.

| kind | stores | score | source |
|---|---|---|---|
| `mlp` | two int8 matrices, trained | predictor/mlp.py | Deja Vu, PowerInfer |
| `svd` | the same, from the gate and the inputs' covariance | the same | SVDP (whitening, bias) |
| `mlp-int4` | `mlp` in 4 bits | of inputs and hidden units rounded to int8 | |
| `gate-int8`, `gate-int4` | the gate in low bits | the gate of rounded inputs | Prox |
| `sign` | one bit per gate weight | signs that agree less those that do not | SparseInfer |

The kind that selects all neurons is no file but the mode `exact`.
Dimension key: N tokens, D model width, R predictor rank, F neurons, C groups of columns, G columns
of a group, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from predictor.base import Predictor
from predictor.low_bits import (
    GROUP,
    check_scales,
    in_groups,
    of_groups,
    pack_nibbles,
    rounded_inputs,
    unpack_nibbles,
)
from predictor.mlp import Int4MlpPredictor, MlpPredictor

OPEN_SHIFT = 4.0  # standard deviations by which the hidden units of `svd` stay above zero
SIGNS_PER_BYTE = 8
BITS_OF_KIND = {"gate-int8": 8, "gate-int4": 4}


class Scorer(Protocol):
    """What it takes to be compared: every `Predictor` does."""

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
    bias_F = centre_F - OPEN_SHIFT * fc2_FR.sum(1)
    return replace(MlpPredictor.from_float(fc1_RD, bias_R, fc2_FR, bias_F), kind="svd")


@dataclass(frozen=True)
class GateCopy(Predictor):
    """The gate in 8 or 4 bits, with one fp16 scale for each GROUP columns of a row."""

    TENSORS: ClassVar[dict[str, str]] = {"gate.weight_q": "packed_FB", "gate.scale": "scale_FC"}
    PER_NEURON: ClassVar[tuple[str, ...]] = ("packed_FB", "scale_FC")

    packed_FB: Tensor  # int8 values, or uint8 with two values each
    scale_FC: Tensor  # fp16

    def __post_init__(self) -> None:
        F, C = self.scale_FC.shape
        dtype = torch.int8 if self.bits == 8 else torch.uint8
        self._expect(
            {
                "packed_FB": (dtype, (F, C * GROUP * self.bits // 8)),
                "scale_FC": (torch.float16, (F, C)),
            }
        )
        check_scales(self.scale_FC, "the gate's low-bit copy")

    @classmethod
    def of(cls, gate_FD: Tensor, bits: int, activation_threshold: float) -> GateCopy:
        """The nearest copy; its threshold is the activation's, the untuned guess."""
        kind = next((kind for kind, b in BITS_OF_KIND.items() if b == bits), None)
        if gate_FD.shape[1] % GROUP or kind is None:
            raise ValueError(
                f"a gate of width {gate_FD.shape[1]} has no {bits}-bit copy in groups of {GROUP}"
            )
        q_FD, scale_FC = in_groups(gate_FD, bits)
        packed_FB = q_FD if bits == 8 else pack_nibbles(q_FD)
        return cls(packed_FB, scale_FC, kind=kind, threshold=float(activation_threshold))

    @property
    def bits(self) -> int:
        return BITS_OF_KIND[self.kind]

    @property
    def d_model(self) -> int:
        return int(self.scale_FC.shape[1]) * GROUP

    @property
    def num_neurons(self) -> int:
        return int(self.scale_FC.shape[0])

    @property
    def q_FD(self) -> Tensor:
        """The whole numbers, int8."""
        return self.packed_FB if self.bits == 8 else unpack_nibbles(self.packed_FB)

    @property
    def copy_FD(self) -> Tensor:
        """The fp32 values that they and the scales stand for."""
        return of_groups(self.q_FD, self.scale_FC)

    def score(self, x_ND: Tensor) -> Tensor:
        """The gate as the copy gives it for `rounded_inputs`."""
        return rounded_inputs(x_ND) @ self.copy_FD.T


@dataclass(frozen=True)
class SignGate(Predictor):
    """One bit per gate weight: how many signs of x and of the row agree, less how many do not."""

    TENSORS: ClassVar[dict[str, str]] = {"gate.signs": "bits_FB"}
    PER_NEURON: ClassVar[tuple[str, ...]] = ("bits_FB",)

    bits_FB: Tensor  # uint8; bit i of byte b is set where column 8 b + i is above zero
    kind: str = field(default="sign", kw_only=True)

    def __post_init__(self) -> None:
        self._expect({"bits_FB": (torch.uint8, (self.bits_FB.shape[0], self.bits_FB.shape[-1]))})

    @classmethod
    def of(cls, gate_FD: Tensor) -> SignGate:
        """Zeros count as negative. The untuned guess: more signs agree than not."""
        if gate_FD.shape[1] % SIGNS_PER_BYTE:
            raise ValueError(
                f"a gate of width {gate_FD.shape[1]} has no signs in bytes of {SIGNS_PER_BYTE}"
            )
        positive_FBI = (gate_FD > 0).view(len(gate_FD), -1, SIGNS_PER_BYTE).to(torch.uint8)
        place_I = torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=gate_FD.device)
        bits_FB = (positive_FBI << place_I).sum(-1, dtype=torch.uint8)
        return cls(bits_FB, threshold=0.0)

    @property
    def d_model(self) -> int:
        return int(self.bits_FB.shape[1]) * SIGNS_PER_BYTE

    @property
    def num_neurons(self) -> int:
        return int(self.bits_FB.shape[0])

    @property
    def sign_FD(self) -> Tensor:
        """-1.0 or 1.0 for each gate weight."""
        place_I = torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=self.bits_FB.device)
        positive_FBI = (self.bits_FB[..., None] >> place_I) & 1
        return positive_FBI.flatten(1).float() * 2 - 1

    def score(self, x_ND: Tensor) -> Tensor:
        """A whole number from -D to D; a NaN in x counts as negative."""
        return torch.where(x_ND > 0, 1.0, -1.0) @ self.sign_FD.T


def of_gate(kind: str, gate_FD: Tensor, threshold: float) -> Predictor:
    """A predictor of one of GATE_KINDS, whose only content is the gate itself."""
    if kind == "sign":
        return SignGate.of(gate_FD).with_threshold(threshold)
    return GateCopy.of(gate_FD, BITS_OF_KIND[kind], threshold)


GATE_KINDS = ("gate-int8", "gate-int4", "sign")
KINDS: dict[str, type[Predictor]] = {
    "mlp": MlpPredictor,
    "mlp-int4": Int4MlpPredictor,
    "svd": MlpPredictor,
    "gate-int8": GateCopy,
    "gate-int4": GateCopy,
    "sign": SignGate,
}
