"""Layers that a placement leaves wholly to the host, beside an accelerator that has the others.

The residual stream goes to the host before the first of several such layers and back behind the
last. Dimensions: N tokens, D model width, F neurons.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .accelerator import Accelerator
from .config import Mode
from .ffn import DenseFFN
from .kv_batch import HostKv

if TYPE_CHECKING:  # the extension may not be built
    from .kernels.cpu import FfnUsage
from .streaming import Attention


class HostAttention:
    """Attention of a layer that is on the host beside an accelerator."""

    def __init__(self, attention: Attention, accelerator: Accelerator) -> None:
        self._attention, self._accelerator = attention, accelerator

    def forward(self, x_ND: Tensor, kv: HostKv) -> None:
        self._accelerator.on_host(lambda: self._attention.forward(x_ND, kv.batch))


class HostFFN:
    """The FFN of such a layer. Decode steps come on the host, prompts and audits from anywhere."""

    num_hot = 0

    def __init__(self, ffn: DenseFFN, accelerator: Accelerator) -> None:
        self._ffn, self._accelerator = ffn, accelerator

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        return self._ffn.forward(x_ND.cpu(), mode, _on_host(selected_NF)).to(x_ND.device)

    def add_to(self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode) -> None:
        self._accelerator.on_host(lambda: self._ffn.add_to(x_ND, norm_D, eps, mode))

    def prefill(
        self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y_ND, h_NF = self._ffn.prefill(x_ND.cpu(), mode, _on_host(selected_NF))
        return y_ND.to(x_ND.device), h_NF.to(x_ND.device)

    def activations(self, x_ND: Tensor) -> Tensor:
        return self._ffn.activations(x_ND.cpu())

    def select(self, x_ND: Tensor) -> Tensor:
        return self._ffn.select(x_ND.cpu()).to(x_ND.device)

    def scores(self, x_ND: Tensor) -> Tensor:
        return self._ffn.scores(x_ND.cpu()).to(x_ND.device)

    @property
    def threshold(self) -> float:
        return self._ffn.threshold

    def set_threshold(self, threshold: float) -> None:
        self._ffn.set_threshold(threshold)

    def take_usage(self) -> "FfnUsage | None":
        return self._ffn.take_usage()


def _on_host(mask_NF: Tensor | None) -> Tensor | None:
    return None if mask_NF is None else mask_NF.cpu()


class Residual:
    """The residual stream of a step, on the side that works on it next."""

    def __init__(self, accelerator: Accelerator, max_tokens: int, d_model: int) -> None:
        self._accelerator = accelerator
        self._copies = accelerator.copy_stream()
        self._host_ND = accelerator.host_buffer(max_tokens, d_model, dtype=torch.float32)
        self._device_ND = torch.empty(max_tokens, d_model, device=accelerator.device)
        self._is_on_host = False

    def begin(self, x_ND: Tensor) -> Tensor:
        """A step's first vectors, from wherever they are, on the accelerator."""
        self._is_on_host = False
        return x_ND.to(self._accelerator.device)

    def bring(self, x_ND: Tensor, to_host: bool) -> Tensor:
        """The same vectors on one of the sides."""
        if to_host == self._is_on_host:
            return x_ND
        self._is_on_host = to_host
        N = len(x_ND)
        if not to_host:
            return self._device_ND[:N].copy_(x_ND, non_blocking=True)
        host_ND = self._host_ND[:N]

        def fetch() -> None:
            self._copies.copy(host_ND, x_ND)
            self._copies.wait()

        self._accelerator.on_host(fetch)
        return host_ND
