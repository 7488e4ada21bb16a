"""Low-rank weight updates, kept and saved in the PEFT format.

The student computes with merged weights (W + B A), not with a side path: one GEMM instead of
three, and what is trained is what will be served.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .modeling import LINEARS, NORMS, BlockWeights, LlamaShape, Merged

FFN_LINEARS = tuple(name for name in LINEARS if name.startswith("mlp."))


class Student:
    """Trainable parameters over a frozen dense state: LoRA pairs for all linears, whole norms.

    With `rank=None` every linear is trained whole instead (full-parameter training).
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        shape: LlamaShape,
        ffn_rank: int | None,
        attention_rank: int | None,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.state = state
        self.ffn_rank, self.attention_rank = ffn_rank, attention_rank
        self.params: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for layer in range(shape.num_layers):
            for name in LINEARS:
                key = f"model.layers.{layer}.{name}"
                weight = state[f"{key}.weight"]
                rank = ffn_rank if name in FFN_LINEARS else attention_rank
                if rank is None:
                    self.params[f"{key}.weight"] = weight.float().clone()
                    continue
                bound = 1 / math.sqrt(weight.shape[1])
                a = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
                self.params[f"{key}.lora_A.weight"] = a.to(weight.device)
                b = torch.zeros(weight.shape[0], rank, device=weight.device)
                self.params[f"{key}.lora_B.weight"] = b
            for name in NORMS:
                key = f"model.layers.{layer}.{name}.weight"
                self.params[key] = state[key].float().clone()
        self.params["model.norm.weight"] = state["model.norm.weight"].float().clone()
        for param in self.params.values():
            param.requires_grad_(True)

    @property
    def is_lora(self) -> bool:
        return self.ffn_rank is not None and self.attention_rank is not None

    def _linears(self, layer: int, names: tuple[str, ...]) -> Tensor | Merged:
        """Matrices with the same input, stacked: trained whole, or merged with their updates."""
        weights: list[Tensor] = []
        factors: list[Tensor] = []
        for name in names:
            key = f"model.layers.{layer}.{name}"
            weight = self.state[f"{key}.weight"]
            if f"{key}.weight" in self.params:
                weights.append(self.params[f"{key}.weight"].to(weight.dtype))
                continue
            a = self.params[f"{key}.lora_A.weight"].to(weight.dtype)
            b = self.params[f"{key}.lora_B.weight"].to(weight.dtype)
            with torch.no_grad():
                weights.append(torch.addmm(weight, b, a))
            factors += [a, b]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        return Merged(stacked, tuple(factors)) if factors else stacked

    def block(self, layer: int) -> BlockWeights:
        """The merged weights of one layer, differentiable."""
        dtype = self.state["model.norm.weight"].dtype
        norm1, norm2 = (
            self.params[f"model.layers.{layer}.{name}.weight"].to(dtype) for name in NORMS
        )
        return BlockWeights(
            norm1,
            self._linears(layer, LINEARS[:3]),
            self._linears(layer, LINEARS[3:4]),
            norm2,
            self._linears(layer, LINEARS[4:6]),
            self._linears(layer, LINEARS[6:]),
        )

    def final_norm(self) -> Tensor:
        weight = self.params["model.norm.weight"]
        return weight.to(self.state["model.norm.weight"].dtype)

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The whole checkpoint with the updates folded in (fp64 merge: same bytes everywhere)."""
        merged = dict(self.state)
        for key, param in self.params.items():
            if key.endswith(".lora_A.weight"):
                base = key.removesuffix(".lora_A.weight")
                weight = self.state[f"{base}.weight"]
                b = self.params[f"{base}.lora_B.weight"].to(torch.bfloat16).double()
                a = param.to(torch.bfloat16).double()
                merged[f"{base}.weight"] = (weight.double() + b @ a).to(weight.dtype)
            elif not key.endswith(".lora_B.weight"):
                merged[key] = param.to(self.state[key].dtype)
        return merged

    def save_adapter(self, folder: Path, base_model: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors as `peft` reads them."""
        if self.ffn_rank is None or self.attention_rank is None:
            raise ValueError("only LoRA training has an adapter; save a full model instead")
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for key, param in self.params.items():
            tensors[f"base_model.model.{key}"] = param.detach().to(torch.bfloat16).contiguous()
        leaf = [name.rsplit(".", 1)[-1] for name in LINEARS]
        ranks = {name.rsplit(".", 1)[-1]: self.ffn_rank for name in FFN_LINEARS}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.attention_rank,
            "lora_alpha": self.attention_rank,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": leaf,
            "modules_to_save": [*NORMS, "norm"],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
        temporary = folder / "adapter_model.safetensors.part"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def load_adapter(self, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for key, param in self.params.items():
                param.copy_(tensors[f"base_model.model.{key}"])
