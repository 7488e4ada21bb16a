"""What a model can be asked for: checks that need no weights."""

from typing import Literal

import torch

from .config import ModelConfig
from .errors import InvalidConfig

Kernels = Literal["cpu", "torch"]

NOT_SPARSE = (
    "the model's activation is {name}: no neuron is ever exactly zero, so only mode dense exists; "
    "make a sparse model of it with `hotneuron prosparse`"
)


def check_quantizable(config: ModelConfig, device: torch.device, kernels: Kernels) -> None:
    if kernels != "cpu" or device.type != "cpu":
        raise InvalidConfig(
            "weights in 8 or 4 bits run by the C++ kernels on the host only; leave --weights out, "
            "or use `--device cpu --kernels cpu`"
        )
    from .kernels.quantized import GROUP

    if any(width % GROUP for width in (config.d_model, config.num_heads * config.head_dim)):
        raise InvalidConfig(
            f"weights in 8 or 4 bits need matrix widths in groups of {GROUP}; this model's is "
            f"{config.d_model}: use `--weights bf16`"
        )
