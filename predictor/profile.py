"""How often each neuron fired over a body of text: what placement ranks neurons by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from predictor.files import PredictorCorrupted, write_safetensors

PROFILE_FILE = "profile.safetensors"


@dataclass
class ActivationProfile:
    """Counts of active tokens per layer and neuron. Two profiles of one model can be added."""

    counts_LF: Tensor  # int64
    num_tokens: int

    def __post_init__(self) -> None:
        if self.counts_LF.ndim != 2 or self.counts_LF.dtype != torch.int64:
            raise ValueError(
                f"counts_LF must be int64 [layers, neurons], is {self.counts_LF.dtype} "
                f"{tuple(self.counts_LF.shape)}."
            )

    @property
    def frequency_LF(self) -> Tensor:
        """Share of tokens on which each neuron fired (fp32)."""
        return (self.counts_LF.double() / max(1, self.num_tokens)).float()

    def add(self, layer: int, active_NF: Tensor) -> None:
        """Count a layer's activity; the caller adds the tokens to num_tokens once per forward."""
        self.counts_LF[layer] += active_NF.sum(0).to(self.counts_LF)

    def save(self, path: Path) -> None:
        fits = self.num_tokens <= torch.iinfo(torch.int32).max
        counts_LF = self.counts_LF.to(torch.int32) if fits else self.counts_LF
        write_safetensors(
            Path(path),
            {"counts": counts_LF.contiguous()},
            {"num_tokens": str(self.num_tokens)},
        )

    @classmethod
    def load(cls, path: Path) -> ActivationProfile:
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as tensors:
                num_tokens = int(tensors.metadata()["num_tokens"])
                return cls(tensors.get_tensor("counts").to(torch.int64), num_tokens)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise PredictorCorrupted(
                f"`{path}` is not a readable activation profile ({error}). "
                "Make it anew with `train-predictors`."
            ) from error
