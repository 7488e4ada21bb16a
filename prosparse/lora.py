"""Low-rank weight updates, kept and saved in the PEFT format.

The student computes with merged weights (W + B A), not with a side path: one GEMM instead of
three, and what is trained is what will be served. It is a `torch.nn.Module` so that its layers can
be sharded over processes (parallel.py); a sharded weight is whole only inside its layer's forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .modeling import LINEARS, NORMS, BlockWeights, LlamaShape, Merged, rms_norm
from .parallel import whole

FFN_LINEARS = tuple(name for name in LINEARS if name.startswith("mlp."))
FINAL_NORM = "model.norm.weight"
COMPUTE_DTYPE = torch.bfloat16


def _attribute(name: str) -> str:
    """A name that a module may give to a parameter: no dots."""
    return name.replace(".", "_")


class StudentLayer(nn.Module):
    """One decoder layer: frozen matrices and their low-rank updates, or matrices trained whole."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        ranks: dict[str, int | None],
        generator: torch.Generator,
    ) -> None:
        """`weights` by names like `mlp.gate_proj.weight`; `ranks` of LINEARS, None: whole."""
        super().__init__()
        self.ranks = ranks
        self.names: list[str] = []  # of what is trained, in checkpoint terms
        for name in LINEARS:
            weight = weights[f"{name}.weight"]
            rank = ranks[name]
            if rank is None:
                self._train(f"{name}.weight", weight.float().clone())
                continue
            frozen = nn.Parameter(weight.to(COMPUTE_DTYPE), requires_grad=False)
            self.register_parameter(_attribute(name), frozen)
            bound = 1 / math.sqrt(weight.shape[1])
            a = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
            self._train(f"{name}.lora_A.weight", a.to(weight.device))
            b = torch.zeros(weight.shape[0], rank, device=weight.device)
            self._train(f"{name}.lora_B.weight", b)
        for name in NORMS:
            self._train(f"{name}.weight", weights[f"{name}.weight"].float().clone())

    def _train(self, name: str, start: Tensor) -> None:
        self.register_parameter(_attribute(name), nn.Parameter(start))
        self.names.append(name)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the checkpoint below `model.layers.N.`, parameter)."""
        for name in self.names:
            yield name, getattr(self, _attribute(name))

    def forward(self, x_BSD: Tensor, run_block: Callable[..., Any], *rest: Any) -> Any:
        """`run_block(x, the merged weights, *rest)`; see modeling.block."""
        return run_block(x_BSD, self._weights(), *rest)

    def _weights(self) -> BlockWeights:
        norm1, norm2 = (
            getattr(self, _attribute(f"{name}.weight")).to(COMPUTE_DTYPE) for name in NORMS
        )
        return BlockWeights(
            norm1,
            self._linears(LINEARS[:3]),
            self._linears(LINEARS[3:4]),
            norm2,
            self._linears(LINEARS[4:6]),
            self._linears(LINEARS[6:]),
        )

    def _linears(self, names: tuple[str, ...]) -> Tensor | Merged:
        """Matrices with the same input, stacked: trained whole, or merged with their updates."""
        weights: list[Tensor] = []
        factors: list[Tensor] = []
        for name in names:
            if self.ranks[name] is None:
                weights.append(getattr(self, _attribute(f"{name}.weight")).to(COMPUTE_DTYPE))
                continue
            a = getattr(self, _attribute(f"{name}.lora_A.weight")).to(COMPUTE_DTYPE)
            b = getattr(self, _attribute(f"{name}.lora_B.weight")).to(COMPUTE_DTYPE)
            with torch.no_grad():
                weights.append(torch.addmm(getattr(self, _attribute(name)), b, a))
            factors += [a, b]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        return Merged(stacked, tuple(factors)) if factors else stacked


class Student(nn.Module):
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
        super().__init__()
        self.shape = shape
        self.ffn_rank, self.attention_rank = ffn_rank, attention_rank
        ranks = {name: ffn_rank if name in FFN_LINEARS else attention_rank for name in LINEARS}
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for layer in range(shape.num_layers):
            prefix = f"model.layers.{layer}."
            weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            layers.append(StudentLayer(weights, ranks, generator))
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.Parameter(state[FINAL_NORM].float().clone())

    @property
    def is_lora(self) -> bool:
        return self.ffn_rank is not None and self.attention_rank is not None

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """What is trained, by checkpoint names."""
        params: dict[str, nn.Parameter] = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, StudentLayer)
            for name, param in layer.trained():
                params[f"model.layers.{number}.{name}"] = param
        return params | {FINAL_NORM: self.final_norm}

    def forward(
        self, x_BSD: Tensor, run_block: Callable[..., Any], *rest: Any
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """(residual stream after each layer, last one normed, mean |x1| [L], zeros of x1 [L])."""
        stream, l1s, zeros = [], [], []
        for layer in self.layers:
            x_BSD, l1_BS, zeros_BS = layer(x_BSD, run_block, *rest)
            stream.append(x_BSD)
            l1s.append(l1_BS.mean())
            zeros.append(zeros_BS.detach().mean())
        normed_BSD = rms_norm(x_BSD, self.final_norm.to(COMPUTE_DTYPE), self.shape.norm_eps)
        return stream, normed_BSD, torch.stack(l1s), torch.stack(zeros)

    def whole_params(self) -> dict[str, Tensor]:
        """`params` as plain tensors; where they are sharded, every process has to ask."""
        return {name: whole(param.detach()) for name, param in self.params.items()}

    @torch.no_grad()
    def merged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The dense `state` with the updates folded in (fp64 merge: same bytes everywhere)."""
        merged = dict(state)
        params = self.whole_params()
        for key, param in params.items():
            if key.endswith(".lora_A.weight"):
                base = key.removesuffix(".lora_A.weight")
                weight = state[f"{base}.weight"]
                b = params[f"{base}.lora_B.weight"].to(COMPUTE_DTYPE).double()
                a = param.to(COMPUTE_DTYPE).double()
                merged[f"{base}.weight"] = (weight.double() + b @ a).to(weight.dtype)
            elif not key.endswith(".lora_B.weight"):
                merged[key] = param.to(state[key].dtype)
        return merged

    def adapter(self, base_model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, adapter_config.json) as `peft` reads them."""
        if self.ffn_rank is None or self.attention_rank is None:
            raise ValueError("only LoRA training has an adapter; save a full model instead")
        tensors = {
            f"base_model.model.{key}": param.to(torch.bfloat16).contiguous().cpu()
            for key, param in self.whole_params().items()
        }
        leaf = [name.rsplit(".", 1)[-1] for name in LINEARS]
        ranks = {name.rsplit(".", 1)[-1]: self.ffn_rank for name in FFN_LINEARS}
        config: dict[str, Any] = {
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
        return tensors, config

    def load_adapter(self, folder: Path) -> None:
        """Start from an earlier run's adapter (before the layers are sharded)."""
        tensors = load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for key, param in self.params.items():
                param.copy_(tensors[f"base_model.model.{key}"])
