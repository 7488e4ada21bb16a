"""Which neurons live on the accelerator, and where each layer attends: the value and its file.

A permutation of each layer's neurons (most active first), how many of them are hot, and the home of
the layer's attention weights. The planner makes it, the loader applies it, the layers only read it.
Dimensions: L layers, F neurons.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from predictor.files import write_safetensors

from .errors import PlacementError

FORMAT_VERSION = "2"
# Where a layer's attention weights are: in accelerator memory; in host memory, copied over each
# time they are needed; or in host memory with the whole layer computed there.
Home = Literal["accelerator", "streamed", "host"]
HOMES: tuple[Home, ...] = ("accelerator", "streamed", "host")


@dataclass(frozen=True, eq=False)
class Placement:
    """`order_LF[l, i]` is the checkpoint's index of layer l's i-th neuron; the first are hot."""

    order_LF: Tensor  # int64
    num_hot_L: tuple[int, ...]
    home_L: tuple[Home, ...] = ()  # none given: every layer attends on the accelerator

    def __post_init__(self) -> None:
        if not self.home_L:
            object.__setattr__(self, "home_L", ("accelerator",) * len(self.num_hot_L))
        if self.order_LF.ndim != 2 or len(self.num_hot_L) != len(self.order_LF):
            raise PlacementError(
                f"a placement needs one order and one count per layer, got order "
                f"{tuple(self.order_LF.shape)} and {len(self.num_hot_L)} counts"
            )
        L, F = self.order_LF.shape
        if not torch.equal(self.order_LF.sort(dim=1).values, torch.arange(F).expand(L, F)):
            raise PlacementError("a layer's order is not a permutation of its neurons")
        if any(not 0 <= n <= F for n in self.num_hot_L):
            raise PlacementError(f"hot counts must be from 0 to {F}, got {self.num_hot_L}")
        if len(self.home_L) != L or not set(self.home_L) <= set(HOMES):
            raise PlacementError(f"a placement needs one home of {HOMES} per layer")
        if any(n and home == "host" for n, home in zip(self.num_hot_L, self.home_L, strict=True)):
            raise PlacementError("a layer on the host has no hot neurons")

    @property
    def host_layers(self) -> tuple[int, ...]:
        return tuple(l for l, home in enumerate(self.home_L) if home == "host")

    @property
    def layers_kept_on_host(self) -> tuple[int, ...]:
        """Those whose attention weights are in host memory."""
        return tuple(l for l, home in enumerate(self.home_L) if home != "accelerator")

    def check_fits(self, num_layers: int, num_neurons: int) -> None:
        if tuple(self.order_LF.shape) != (num_layers, num_neurons):
            raise PlacementError(
                f"the placement is for {tuple(self.order_LF.shape)} (layers, neurons), the model "
                f"has {(num_layers, num_neurons)}; plan it again with `hotneuron place`"
            )

    def save(self, path: Path, fingerprint: str) -> None:
        tensors = {
            "order": self.order_LF.contiguous(),
            "num_hot": torch.tensor(self.num_hot_L),
            "home": torch.tensor([HOMES.index(home) for home in self.home_L]),
        }
        metadata = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Placement":
        fix = "plan it again with `hotneuron place`"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PlacementError(f"{path} is not a readable placement ({error}); {fix}") from error
        if metadata.get("format_version") != FORMAT_VERSION:
            raise PlacementError(f"{path} has another format version; {fix}")
        if metadata.get("fingerprint") != fingerprint:
            raise PlacementError(
                f"{path} was planned for the model {metadata.get('fingerprint')}, this one is "
                f"{fingerprint}; {fix}"
            )
        num_hot_L = tuple(int(n) for n in tensors["num_hot"])
        return cls(tensors["order"], num_hot_L, tuple(HOMES[i] for i in tensors["home"]))
