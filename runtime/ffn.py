"""The FFN of one layer, in shapes with one face; a third, HybridFFN, is made of these (hybrid.py).

DenseFFN    torch products on any device; modes by masks. What prompts use, and the definition.
SparseFFN   decodes with the C++ kernel, which reads only the rows of neurons that fire.

Each reads its weights and never changes them. Nothing here decides what is hot: see placement.py.
Dimensions: N tokens, D model width, F neurons.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from predictor import Predictor

from .config import Mode, ModelConfig
from .loader import FfnWeights
from .torch_ops import linear, rms_norm

if TYPE_CHECKING:
    from .kernels.cpu import FfnUsage


class FFN(Protocol):
    """`x_ND` is the normed input, fp32, on the model's device; so is the result."""

    num_hot: int

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        """One decode step. Mode predicted keeps `selected_NF`, or asks the predictor."""

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        """One decode step on the residual stream, in place: x += ffn(rms_norm(x))."""

    def prefill(
        self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Many tokens at once by torch products; returns (y_ND, h_NF before any selection)."""

    def activations(self, x_ND: Tensor) -> Tensor:
        """The true h_NF = act(gate) * up of every neuron, as a decode step would compute it."""

    def select(self, x_ND: Tensor) -> Tensor:
        """bool mask_NF: the neurons that the predictor lets through."""

    def scores(self, x_ND: Tensor) -> Tensor:
        """score_NF of the predictor; it lets through what lies above its threshold."""

    @property
    def threshold(self) -> float:
        """The predictor's."""

    def set_threshold(self, threshold: float) -> None:
        """The predictor's threshold from now on: what the drift guard lowers."""

    def take_usage(self) -> "FfnUsage | None":
        """What decode steps did here since this was last asked; None where nothing counts it."""


class ResidualFFN:
    """Works on the residual stream by its `forward`."""

    num_hot: int

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        x_ND += self.forward(rms_norm(x_ND, norm_D, eps), mode)

    def take_usage(self) -> "FfnUsage | None":
        return None


class DenseFFN(ResidualFFN):
    """All neurons by torch products. 'exact' skips nothing here: h is zero where it could."""

    def __init__(
        self,
        weights: FfnWeights,
        config: ModelConfig,
        layer: int,
        predictor: Predictor | None = None,
        *,
        is_hot: bool = False,
    ) -> None:
        self.num_hot = len(weights.gate_FD) if is_hot else 0
        self.num_neurons = len(weights.gate_FD)
        self.weights = weights
        self.predictor = predictor
        self._is_relu, self._threshold = config.activation == "relu", config.thresholds[layer]

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        return self.prefill(x_ND, mode, selected_NF)[0]

    def forward_into(
        self, out_ND: Tensor, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None
    ) -> None:
        """`forward`, with the result in a buffer of the caller's."""
        out_ND.copy_(self.forward(x_ND, mode, selected_NF))

    def prefill(
        self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        h_NF = self._gated(x_ND)
        if mode != "predicted":
            return self._down(h_NF), h_NF
        if selected_NF is None:
            selected_NF = self.select(x_ND)
        return self._down(torch.where(selected_NF, h_NF, 0.0)), h_NF

    def activations(self, x_ND: Tensor) -> Tensor:
        return self._gated(x_ND)

    def select(self, x_ND: Tensor) -> Tensor:
        return self._own_predictor.select(x_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        return self._own_predictor.score(x_ND)

    @property
    def threshold(self) -> float:
        return self._own_predictor.threshold

    def set_threshold(self, threshold: float) -> None:
        self.predictor = self._own_predictor.with_threshold(threshold)

    @property
    def _own_predictor(self) -> Predictor:
        assert self.predictor is not None, "the model checks modes before it comes here"
        return self.predictor

    def _down(self, h_NF: Tensor) -> Tensor:
        down_FD = self.weights.down_FD
        if not isinstance(down_FD, Tensor):
            down_FD = down_FD.dequantize(torch.bfloat16)
        return (h_NF.to(down_FD.dtype) @ down_FD).float()

    def _gated(self, x_ND: Tensor) -> Tensor:
        act_NF = self._activate(linear(x_ND, self.weights.gate_FD))
        return act_NF.mul_(linear(x_ND, self.weights.up_FD))

    def _activate(self, gate_NF: Tensor) -> Tensor:
        if self._is_relu:
            return torch.nn.functional.threshold(gate_NF, self._threshold, 0.0)
        return torch.nn.functional.silu(gate_NF)


class SparseFFN(DenseFFN):
    """Decode by the C++ kernel on the same weights; prompts as in DenseFFN. SiLU runs dense only:
    the baseline of a sparse model."""

    def __init__(
        self,
        weights: FfnWeights,
        config: ModelConfig,
        layer: int,
        predictor: Predictor | None = None,
        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """`keep` copies what the kernel makes of the predictor to where it shall stay."""
        super().__init__(weights, config, layer, predictor)
        from .kernels.cpu import CpuFfn

        self.kernel = CpuFfn(
            weights.gate_FD,
            weights.up_FD,
            weights.down_FD,
            self._threshold,
            predictor,
            silu=not self._is_relu,
            keep=keep,
        )

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        out_ND = torch.empty_like(x_ND)
        self.forward_into(out_ND, x_ND, mode, selected_NF)
        return out_ND

    def forward_into(
        self, out_ND: Tensor, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None
    ) -> None:
        if selected_NF is not None:
            self.kernel.forward_selected(x_ND, selected_NF, out_ND)
        else:
            self.kernel.forward(x_ND, mode, out_ND)

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        self.kernel.forward_residual(x_ND, norm_D, eps, mode)

    def activations(self, x_ND: Tensor) -> Tensor:
        return self.kernel.activations(x_ND)

    def select(self, x_ND: Tensor) -> Tensor:
        return self.kernel.select(x_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        return self.kernel.scores(x_ND)

    def set_threshold(self, threshold: float) -> None:
        super().set_threshold(threshold)
        self.kernel.set_threshold(threshold)

    def take_usage(self) -> "FfnUsage | None":
        return self.kernel.take_usage()
