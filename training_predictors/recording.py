"""Recorded FFN inputs and activity on disk: shards written in order, read back by layer.

A shard holds some tokens of all layers: x as fp16, the root mean square that its norm divided by as
fp32, activity as packed bits, and for the active neurons |h| * norm(down) as fp16 in row order. A
shard appears under its name when it is complete, so whatever has a name can be trusted after an
interrupt.
Dimension key: N tokens, D model width, F neurons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from predictor.files import write_safetensors
from training_predictors.documents import SPLITS

FORMAT_VERSION = 2  # 2: with the root mean squares
FP16_MAX = 65504.0
FP16_TINY = 6e-8  # the smallest fp16 above zero, so that an active neuron keeps a magnitude


def pack_bits(mask_NF: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask_NF.cpu().numpy(), axis=1, bitorder="little"))


def unpack_bits(packed: Tensor, num_neurons: int) -> Tensor:
    bits = np.unpackbits(packed.numpy(), axis=1, count=num_neurons, bitorder="little")
    return torch.from_numpy(bits).bool()


@dataclass
class ShardBuffer:
    """The tokens of a shard to be, in memory."""

    num_layers: int
    x: list[list[Tensor]] = field(init=False)
    rms: list[list[Tensor]] = field(init=False)
    active: list[list[Tensor]] = field(init=False)
    magnitude: list[list[Tensor]] = field(init=False)
    split: list[int] = field(default_factory=list)
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self.x = [[] for _ in range(self.num_layers)]
        self.rms = [[] for _ in range(self.num_layers)]
        self.active = [[] for _ in range(self.num_layers)]
        self.magnitude = [[] for _ in range(self.num_layers)]

    def add_layer(self, layer: int, x_ND: Tensor, rms_N: Tensor, magnitude_NF: Tensor) -> None:
        """Keep a layer's tokens; magnitude is |h| * norm(down), zero where the neuron is silent."""
        if not float(x_ND.abs().max()) <= FP16_MAX:
            raise ValueError(f"layer {layer}: the FFN input is not finite in fp16.")
        active_NF = magnitude_NF > 0
        kept = magnitude_NF[active_NF].clamp(FP16_TINY, FP16_MAX).to(torch.float16)
        for store, value in (
            (self.x, x_ND.to(torch.float16)),
            (self.rms, rms_N.to(torch.float32)),
            (self.active, pack_bits(active_NF)),
            (self.magnitude, kept),
        ):
            store[layer].append(value)
            self.num_bytes += value.numel() * value.element_size()

    def add_tokens(self, split: str, count: int) -> None:
        self.split += [SPLITS.index(split)] * count

    def write(self, path: Path, facts: dict[str, Any], *, is_private: bool = False) -> None:
        tensors = {"split": torch.tensor(self.split, dtype=torch.uint8)}
        for layer in range(self.num_layers):
            tensors[f"x.{layer}"] = torch.cat(self.x[layer])
            tensors[f"rms.{layer}"] = torch.cat(self.rms[layer])
            tensors[f"active.{layer}"] = torch.cat(self.active[layer])
            tensors[f"magnitude.{layer}"] = torch.cat(self.magnitude[layer])
        write_safetensors(path, tensors, {"facts": json.dumps(facts)}, is_private=is_private)


@dataclass
class LayerData:
    """One layer's tokens of one split."""

    x_ND: Tensor  # fp16
    rms_N: Tensor  # fp32; what the norm divided by to make x; NaN in kept audit samples
    magnitude_NF: Tensor  # fp16; |h| * norm(down), zero where silent

    @property
    def num_tokens(self) -> int:
        return int(self.x_ND.shape[0])

    @property
    def active_NF(self) -> Tensor:
        return self.magnitude_NF > 0

    def residual_ND(self, norm_D: Tensor) -> Tensor:
        """The residual stream before the FFN's norm (fp32), from x = residual / rms * norm.

        A column that the norm's weight silences cannot be had back; it is 0, as is all that the
        FFN sees of it.
        """
        norm_D = norm_D.float()
        inverse_D = torch.where(norm_D != 0, 1 / norm_D, 0.0)
        return self.x_ND.float() * inverse_D * self.rms_N[:, None]


class Recording:
    """A folder of shards, read by layer and split."""

    def __init__(self, folder: Path, num_neurons: int) -> None:
        self.num_neurons = num_neurons
        self.shards = sorted(folder.glob("shard-*.safetensors"))

    def facts(self) -> list[dict[str, Any]]:
        """What each shard says about itself, in order."""
        found = []
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                found.append(json.loads(tensors.metadata()["facts"]))
        return found

    def tokens_by_split(self) -> dict[str, int]:
        counts = dict.fromkeys(SPLITS, 0)
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                split_N = tensors.get_tensor("split")
            for index, name in enumerate(SPLITS):
                counts[name] += int((split_N == index).sum())
        return counts

    def layer(self, layer: int, split: str) -> LayerData:
        xs, rms, magnitudes = [], [], []
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                of_split_N = tensors.get_tensor("split") == SPLITS.index(split)
                active_NF = unpack_bits(tensors.get_tensor(f"active.{layer}"), self.num_neurons)
                magnitude_NF = torch.zeros(active_NF.shape, dtype=torch.float16)
                magnitude_NF[active_NF] = tensors.get_tensor(f"magnitude.{layer}")
                xs.append(tensors.get_tensor(f"x.{layer}")[of_split_N])
                rms.append(tensors.get_tensor(f"rms.{layer}")[of_split_N])
                magnitudes.append(magnitude_NF[of_split_N])
        return LayerData(torch.cat(xs), torch.cat(rms), torch.cat(magnitudes))

    def active_counts(self, num_layers: int) -> Tensor:
        """counts_LF over all splits but `other`: the activation profile."""
        counts_LF = torch.zeros(num_layers, self.num_neurons, dtype=torch.int64)
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                counts_N = tensors.get_tensor("split") != SPLITS.index("other")
                for layer in range(num_layers):
                    packed = tensors.get_tensor(f"active.{layer}")[counts_N]
                    counts_LF[layer] += unpack_bits(packed, self.num_neurons).sum(0)
        return counts_LF
