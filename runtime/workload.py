"""What planning knows: of a machine, how fast each side reads; of a model, what a token reads.

Dimensions: L layers, F neurons.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ROWS = 3  # of a neuron: gate, up, down
SELECTED_PER_ACTIVE = 1.7  # by a predictor, where its own figure is not known


@dataclass(frozen=True)
class MachineCosts:
    """What planning knows of a machine; `is_measured` says whether it is this one."""

    hot_bytes_per_s: float  # weight rows read on the accelerator
    cold_bytes_per_s: float  # rows of active neurons read on the host
    host_bytes_per_s: float  # whole matrices read on the host
    link_bytes_per_s: float  # copies from pinned host memory
    sync_s: float  # handing one vector over and joining
    layer_s: float = 30e-6  # starting a layer's kernels, besides what they read
    is_measured: bool = False

    def __post_init__(self) -> None:
        rates = (self.hot_bytes_per_s, self.cold_bytes_per_s, self.host_bytes_per_s)
        if min(*rates, self.link_bytes_per_s) <= 0 or min(self.sync_s, self.layer_s) < 0:
            raise ValueError(f"machine costs must be positive: {self}")


@dataclass(frozen=True, eq=False)
class Workload:
    """What one decoded token asks of a model, and what its parts take up. All in bytes."""

    frequency_LF: Tensor  # share of tokens on which each neuron fires
    row_bytes: int  # one row of gate, up or down
    attention_bytes: int  # of one layer's weights
    kv_bytes: int = 0  # of one layer's keys and values, all cached tokens together
    predictor_bytes: int = 0  # of one layer
    head_bytes: int = 0
    mode: Literal["dense", "exact", "predicted"] = "exact"
    selected_per_active: float = SELECTED_PER_ACTIVE
    hot_is_sparse: bool = False  # whether the accelerator skips rows as well
    given_order_LF: Tensor | None = None  # in which neurons become hot; by frequency if not given

    @cached_property
    def order_LF(self) -> Tensor:
        if self.given_order_LF is not None:
            return self.given_order_LF
        return torch.argsort(self.frequency_LF, dim=1, descending=True, stable=True)

    @cached_property
    def sorted_LF(self) -> np.ndarray:
        """frequency_LF in that order."""
        sorted_LF: np.ndarray = torch.gather(self.frequency_LF.double(), 1, self.order_LF).numpy()
        return sorted_LF

    @property
    def num_layers(self) -> int:
        return len(self.frequency_LF)

    @property
    def num_neurons(self) -> int:
        return self.frequency_LF.shape[1]

    @property
    def active_share(self) -> float:
        """Of all neurons, the mean over tokens."""
        return float(self.frequency_LF.double().mean())

    @property
    def neuron_bytes(self) -> int:
        return ROWS * self.row_bytes

    def read_bytes_LF(self, is_sparse: bool) -> np.ndarray:
        """Bytes that a token reads of each neuron on average, hottest first."""
        if self.mode == "dense" or not is_sparse:
            return np.full(self.sorted_LF.shape, float(self.neuron_bytes))
        gate_LF = np.ones_like(self.sorted_LF)
        if self.mode == "predicted":
            gate_LF = np.minimum(1.0, self.selected_per_active * self.sorted_LF)
        rows_LF: np.ndarray = gate_LF + 2 * self.sorted_LF
        return rows_LF * self.row_bytes
