"""FFN layers with random weights, built in the GPU's memory: what the measurements work on."""

import argparse

import torch
from bench_shapes import Gate
from gpu_timing import DEVICE, relative_error, say
from torch import Tensor

from predictor import Predictor
from predictor.kinds import GateCopy
from runtime.config import Mode, ModelConfig
from runtime.cuda_ffn import CudaSparseFFN
from runtime.kernels import reference
from runtime.kernels.cuda import DownBuffers, Rows
from runtime.loader import FfnWeights

EPS = 1e-5
MAX_ERROR = 0.01  # of the sparse kernels against fp64, relative; bf16 products miss it by 0.003


class Layer:
    """One layer's FFN in bf16, with the dense layout of down beside the sparse one."""

    def __init__(self, args: argparse.Namespace, generator: torch.Generator) -> None:
        D, num_neurons = args.d_model, args.num_neurons
        gate = Gate.of_random_sizes(args, generator)
        self.threshold = gate.threshold
        self.gate_FD = gate.weight_FD.bfloat16()
        self.network = gate.network()
        self.copy = GateCopy.of(gate.weight_FD, 4, gate.threshold)
        self.up_FD, self.down_FD = (
            (torch.randn(num_neurons, D, generator=generator, device=DEVICE) / size**0.5).bfloat16()
            for size in (D, num_neurons)
        )
        self.down_DF = self.down_FD.t().contiguous()

    def true_ffn(self, x_ND: Tensor) -> Tensor:
        """In fp32, whatever PyTorch multiplies with."""
        weights = self.gate_FD, self.up_FD, self.down_FD
        return reference.ffn(x_ND, *weights, self.threshold)


def make_layers(args: argparse.Namespace, count: int) -> list[Layer]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    say(f"making {count} layers")
    return [Layer(args, generator) for _ in range(count)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def check(what: str, result: Tensor, truth: Tensor) -> None:
    error = relative_error(result, truth)
    if not error <= MAX_ERROR:  # NaN too
        raise SystemExit(f"{what}: error {error:.3g}, nothing was timed")


def random_records(num_rows: int, num_columns: int, bits: int) -> Rows:
    """Rows of numbers in 8 or 4 bits, as quantized.py lays them out, of size 1 / sqrt(columns)."""
    groups, half_range = num_columns // 32, 127.0 if bits == 8 else 7.5
    numbers = torch.randint(
        0, 256, (num_rows, num_columns * bits // 8), dtype=torch.uint8, device=DEVICE
    )
    size = 3**0.5 / num_columns**0.5 / half_range
    scales = torch.full((num_rows, groups), size, dtype=torch.float16, device=DEVICE)
    halves = scales if bits == 8 else torch.cat((scales, -half_range * scales), 1)
    records = torch.cat((numbers, halves.view(torch.uint8)), 1)
    return Rows(records.contiguous(), bits, (num_rows, num_columns))


def model_config(args: argparse.Namespace, thresholds: list[float]) -> ModelConfig:
    D, H = args.d_model, args.heads
    return ModelConfig.from_hf({
        "model_type": "llama", "num_hidden_layers": len(thresholds), "hidden_size": D,
        "intermediate_size": args.num_neurons, "num_attention_heads": H, "head_dim": D // H,
        "vocab_size": args.vocab, "rms_norm_eps": EPS, "rope_theta": 10000.0,
        "hidden_act": "relu", "hidden_act_param": thresholds,
    })  # fmt: skip


def ffns_of(
    layers: list[Layer], args: argparse.Namespace, buffers: DownBuffers
) -> dict[str, tuple[Mode, list[CudaSparseFFN]]]:
    """By path, the dense one first; all share the same weights."""
    config = model_config(args, [layer.threshold for layer in layers])

    def ffn(l: int, predictor: Predictor | None) -> CudaSparseFFN:
        layer = layers[l]
        weights = FfnWeights(layer.gate_FD, layer.up_FD, layer.down_FD)
        return CudaSparseFFN(weights, config, l, predictor, buffers)

    plain = [ffn(l, None) for l in range(len(layers))]
    return {
        "dense": ("dense", plain),
        "exact": ("exact", plain),
        f"predicted, mlp-{args.hidden}": (
            "predicted", [ffn(l, layer.network) for l, layer in enumerate(layers)],
        ),
        "predicted, gate-int4": (
            "predicted", [ffn(l, layer.copy) for l, layer in enumerate(layers)],
        ),
    }  # fmt: skip
