"""CudaSparseFFN: decodes on the accelerator with the Triton kernels, which read only the rows of
neurons that fire. Prompts, and steps of more than a few tokens, are dense by PyTorch's products.

Nothing here waits for the device, so a step may be captured in a CUDA graph.
Dimensions: N tokens, D model width, F neurons.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor import Predictor

from .config import Mode, ModelConfig
from .ffn import DenseFFN
from .kernels.cuda import CudaFfn, CudaSelector, DownBuffers, Selection, activate, rms_norm
from .loader import FfnWeights

# More tokens together fire more neurons (of 11 % each, 2 tokens 20 %, 4 tokens 35 %), and a dense
# product reads all of them faster than the kernels so many. Measured on an H100 in the shape of
# LLaMA-2-7B: an exact FFN is 2.15 times as fast as a dense one for 1 token, 1.25 for 2, 0.72 for 4.
MAX_SPARSE_TOKENS = 2


class CudaSparseFFN(DenseFFN):
    """Modes exact and predicted by the sparse kernels, dense by PyTorch's own products.

    The products round a vector to the weights' type and the kernels do not, so a token's result
    differs by that rounding with the number of tokens beside it.
    """

    def __init__(
        self,
        weights: FfnWeights,
        config: ModelConfig,
        layer: int,
        predictor: Predictor | None,
        buffers: DownBuffers,
    ) -> None:
        super().__init__(weights, config, layer, predictor, is_hot=True)
        self.kernel = CudaFfn.of(
            weights.gate_FD, weights.up_FD, weights.down_FD, self._threshold, predictor,
            buffers.partial.device, buffers,
        )  # fmt: skip

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        if self._runs_dense(x_ND, mode):
            return super().forward(x_ND, mode if selected_NF is not None else "dense", selected_NF)
        if selected_NF is None or mode != "predicted":
            return self.kernel.forward(x_ND, mode)
        return self.kernel.forward(x_ND, mode, Selection.of_mask(selected_NF))

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        if not self._runs_dense(x_ND, mode):
            self.kernel.add_to(x_ND, rms_norm(x_ND, norm_D, eps), mode)
        elif self._is_relu:
            self._add_dense(x_ND, norm_D, eps)
        else:
            super().add_to(x_ND, norm_D, eps, mode)

    def activations(self, x_ND: Tensor) -> Tensor:
        if self._runs_dense(x_ND, "exact"):
            return super().activations(x_ND)
        return self.kernel.activations(x_ND, "exact")

    def select(self, x_ND: Tensor) -> Tensor:
        return self._selector.mask(x_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        return self._selector.scores(x_ND)

    def set_threshold(self, threshold: float) -> None:
        super().set_threshold(threshold)
        self._selector.set_threshold(threshold)

    @property
    def _selector(self) -> CudaSelector:
        assert self.kernel.selector is not None, "the model checks modes before it comes here"
        return self.kernel.selector

    def _runs_dense(self, x_ND: Tensor, mode: Mode) -> bool:
        """Whether all neurons are computed, those too that a predictor would have left out."""
        return mode == "dense" or not self._is_relu or len(x_ND) > MAX_SPARSE_TOKENS

    def _add_dense(self, x_ND: Tensor, norm_D: Tensor, eps: float) -> None:
        """DenseFFN's sums with as few kernels as there can be: the baseline of the others."""
        w = self.weights
        assert isinstance(w.gate_FD, Tensor)
        assert isinstance(w.up_FD, Tensor)
        assert isinstance(w.down_FD, Tensor)
        normed_ND = rms_norm(x_ND, norm_D, eps, w.gate_FD.dtype)
        h_NF = activate(F.linear(normed_ND, w.gate_FD), F.linear(normed_ND, w.up_FD),
                        self._threshold)  # fmt: skip
        x_ND += torch.matmul(h_NF, w.down_FD)
