"""A LoRA adapter in PEFT format, merged into a dense checkpoint without `peft`.

The merge is W + scale * B @ A in float64, then one rounding to the checkpoint's dtype, so every
machine gets the same weights (the predictors' fingerprint depends on it). Tensors saved whole
(PEFT's `modules_to_save`) replace their counterparts. Anything else in the adapter is refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import ModelNotFound, UnsupportedFile
from .progress import Progress

KEY_PREFIX = "base_model.model."
# Settings under which W + scale * B @ A would not be what the adapter means.
MUST_BE_FALSE = ("use_dora", "fan_in_fan_out", "lora_bias")


class Adapter:
    """The low-rank updates and the whole tensors of one adapter folder."""

    def __init__(self, folder: Path) -> None:
        config_path, weights_path = adapter_files(folder)
        self.config: dict[str, Any] = json.loads(config_path.read_text())
        if self.config.get("peft_type") != "LORA":
            raise UnsupportedFile(
                f"{config_path} is not of the type LORA but {self.config.get('peft_type')!r}"
            )
        for key in MUST_BE_FALSE:
            if self.config.get(key):
                raise UnsupportedFile(f"{config_path} sets {key}, which the merge does not know")
        self.low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        tensors = load_file(weights_path)
        for name, tensor in tensors.items():
            self._sort_in(name, tensor, tensors)

    def _sort_in(
        self, name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        target = name.removeprefix(KEY_PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", target):
            other = f"{KEY_PREFIX}{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight"
            if other not in tensors:
                raise UnsupportedFile(f"the adapter has {name} but lacks {other}")
            if match[2] == "A":
                self.low_rank[match[1]] = (tensor, tensors[other])
        elif name.startswith(KEY_PREFIX) and "lora_" not in name:
            self.whole[target.replace(".modules_to_save.default.", ".")] = tensor
        else:
            raise UnsupportedFile(f"the adapter has a tensor that the merge does not know: {name}")

    def scale(self, module: str) -> float:
        """alpha / r of one module, with PEFT's rank_pattern and alpha_pattern applied."""
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    def merge_into(self, weights: dict[str, torch.Tensor], progress: Progress) -> None:
        """Change `weights` (Hugging Face names) in place."""
        updates = list(self.low_rank.items())
        for module, (a_RI, b_OR) in progress.steps(updates, "merging the adapter"):
            name = f"{module}.weight"
            weight_OI = self._matching(weights, name, (b_OR.shape[0], a_RI.shape[1]))
            rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
            if not a_RI.shape[0] == b_OR.shape[1] == rank:
                raise UnsupportedFile(
                    f"{module}: the adapter's config says rank {rank}, its tensors are "
                    f"{tuple(b_OR.shape)} x {tuple(a_RI.shape)}"
                )
            update_OI = self.scale(module) * (b_OR.double() @ a_RI.double())
            weights[name] = (weight_OI.double() + update_OI).to(weight_OI.dtype)
        for name, tensor in self.whole.items():
            weight = self._matching(weights, name, tuple(tensor.shape))
            weights[name] = tensor.to(weight.dtype)

    @staticmethod
    def _matching(
        weights: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        if name not in weights:
            raise UnsupportedFile(f"the adapter changes {name}, which the base model lacks")
        if tuple(weights[name].shape) != shape:
            raise UnsupportedFile(
                f"the adapter changes {name} as {shape}, the base model has "
                f"{tuple(weights[name].shape)}: it was trained on another model"
            )
        return weights[name]


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The adapter's two files; both must be there."""
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in files:
        if not path.is_file():
            raise ModelNotFound(
                f"the default model's adapter is missing ({path}): restore it from the repository, "
                "or use the dense original with `hotneuron pull default --dense`"
            )
    return files


def _by_pattern(patterns: Mapping[str, int] | None, module: str, default: int) -> int:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return int(value)
    return int(default)
