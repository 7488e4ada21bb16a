"""The FFN of one layer, in three shapes with one face: dense, sparse, hybrid.

DenseFFN    torch products on any device; modes by masks. What prompts use, and the definition.
SparseFFN   decodes with the C++ kernel, which reads only the rows of neurons that fire.
HybridFFN   neurons [:num_hot] on the accelerator, [num_hot:] in host memory, both at once.

Each reads its weights and never changes them. Nothing here decides what is hot: see placement.py.
Dimensions: N tokens, D model width, F neurons.
"""

from concurrent.futures import Executor
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

    def forward(self, x_ND: Tensor, mode: Mode) -> Tensor:
        """One decode step."""

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        """One decode step on the residual stream, in place: x += ffn(rms_norm(x))."""

    def prefill(self, x_ND: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
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


class _FFN:
    """What the three share."""

    num_hot: int

    def forward(self, x_ND: Tensor, mode: Mode) -> Tensor:
        raise NotImplementedError

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        x_ND += self.forward(rms_norm(x_ND, norm_D, eps), mode)

    def take_usage(self) -> "FfnUsage | None":
        return None


class DenseFFN(_FFN):
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
        self.weights = weights
        self.predictor = predictor
        self._is_relu, self._threshold = config.activation == "relu", config.thresholds[layer]

    def forward(self, x_ND: Tensor, mode: Mode) -> Tensor:
        return self.prefill(x_ND, mode)[0]

    def prefill(self, x_ND: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        h_NF = self._gated(x_ND)
        kept_NF = torch.where(self._mask(x_ND), h_NF, 0.0) if mode == "predicted" else h_NF
        return self._down(kept_NF), h_NF

    def activations(self, x_ND: Tensor) -> Tensor:
        return self._gated(x_ND)

    def select(self, x_ND: Tensor) -> Tensor:
        return self._mask(x_ND)

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

    def _mask(self, x_ND: Tensor) -> Tensor:
        return self._own_predictor.select(x_ND)

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
    ) -> None:
        super().__init__(weights, config, layer, predictor)
        from .kernels.cpu import CpuFfn

        self.kernel = CpuFfn(
            weights.gate_FD,
            weights.up_FD,
            weights.down_FD,
            self._threshold,
            predictor,
            silu=not self._is_relu,
        )

    def forward(self, x_ND: Tensor, mode: Mode) -> Tensor:
        return self.kernel.forward(x_ND, mode)

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


class HybridFFN(_FFN):
    """Hot neurons where the accelerator is, cold ones on the host in `worker`; joined once.

    The worker thread runs while this one drives the accelerator: the kernels release the GIL.
    """

    def __init__(self, hot: DenseFFN, cold: DenseFFN, worker: Executor) -> None:
        self.hot, self.cold = hot, cold
        self.num_hot = hot.num_hot
        self._worker = worker

    def forward(self, x_ND: Tensor, mode: Mode) -> Tensor:
        host_x_ND = x_ND.cpu()
        cold = self._worker.submit(self.cold.forward, host_x_ND, mode)
        y_ND = self.hot.forward(x_ND, mode)
        return y_ND + cold.result().to(x_ND.device)

    def prefill(self, x_ND: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        cold = self._worker.submit(self.cold.prefill, x_ND.cpu(), mode)
        y_ND, h_NF = self.hot.prefill(x_ND, mode)
        cold_y_ND, cold_h_NF = (part.to(x_ND.device) for part in cold.result())
        return y_ND + cold_y_ND, torch.cat((h_NF, cold_h_NF), dim=1)

    def activations(self, x_ND: Tensor) -> Tensor:
        cold_NF = self.cold.activations(x_ND.cpu()).to(x_ND.device)
        return torch.cat((self.hot.activations(x_ND), cold_NF), dim=1)

    def select(self, x_ND: Tensor) -> Tensor:
        cold_NF = self.cold.select(x_ND.cpu()).to(x_ND.device)
        return torch.cat((self.hot.select(x_ND), cold_NF), dim=1)

    def scores(self, x_ND: Tensor) -> Tensor:
        cold_NF = self.cold.scores(x_ND.cpu()).to(x_ND.device)
        return torch.cat((self.hot.scores(x_ND), cold_NF), dim=1)

    @property
    def threshold(self) -> float:
        return self.hot.threshold

    def set_threshold(self, threshold: float) -> None:
        self.hot.set_threshold(threshold)
        self.cold.set_threshold(threshold)
