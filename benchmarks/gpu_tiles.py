"""Tiles of the kernels for one token, fastest first: what bench_gpu.py calls `tune`.

The best go into runtime/kernels/cuda.py by hand.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_layers import Layer, make_layers, normal, random_records
from gpu_timing import DEVICE, Results, chain_us, say

from runtime.kernels import cuda
from runtime.kernels.cuda import INT8, DownBuffers, Rows, Selection, Tile

MAX_LAYERS = 6


def _tiles(*shapes: tuple[int, int, int, int]) -> list[Tile]:
    return [Tile(*shape) for shape in shapes]


ROW_TILES = _tiles(
    (4, 4, 1024, 4), (8, 8, 512, 4), (2, 2, 2048, 4), (2, 2, 1024, 2), (4, 4, 512, 2),
    (1, 1, 4096, 4), (8, 8, 1024, 8), (16, 16, 512, 8), (4, 4, 2048, 4), (4, 4, 2048, 8),
)  # fmt: skip
TILES = {
    "up": _tiles(
        (32, 4, 1024, 4), (16, 4, 1024, 4), (32, 2, 2048, 4), (16, 2, 4096, 4), (8, 2, 2048, 4),
        (16, 1, 4096, 4), (8, 1, 4096, 4), (16, 4, 512, 2), (8, 2, 1024, 2), (32, 4, 2048, 8),
    ),
    "down": _tiles(
        (128, 16, 256, 4), (128, 16, 512, 4), (64, 8, 512, 4), (64, 16, 256, 4), (128, 32, 256, 4),
        (256, 32, 256, 8), (128, 16, 128, 2), (256, 32, 128, 4), (64, 8, 256, 2), (128, 8, 512, 4),
    ),
    "exact": ROW_TILES,
    "predicted": _tiles(
        (32, 8, 512, 4), (32, 4, 1024, 4), (16, 4, 1024, 4), (16, 2, 2048, 4), (16, 2, 4096, 4),
        (8, 1, 4096, 4), (32, 8, 1024, 8), (8, 2, 1024, 2), (16, 4, 512, 2), (64, 8, 512, 4),
    ),
    "linear bf16": ROW_TILES,
    "linear int8": _tiles(
        (4, 4, 1024, 4), (8, 8, 1024, 4), (16, 16, 512, 4), (8, 8, 512, 4), (4, 4, 1024, 2),
        (16, 16, 1024, 8), (2, 2, 1024, 1), (8, 8, 1024, 2),
    ),
    "linear 4 bits": ROW_TILES,
}  # fmt: skip


class Case:
    """Every kernel on one layer, for any tile."""

    def __init__(self, layer: Layer, x_ND: torch.Tensor, buffers: DownBuffers) -> None:
        self.layer, self.x_ND, self.buffers = layer, x_ND, buffers
        self.gate, self.up, self.down = (
            Rows.of(w, DEVICE) for w in (layer.gate_FD, layer.up_FD, layer.down_FD)
        )
        F, D = layer.gate_FD.shape
        self.qkv = Rows.of(normal(3 * D, D).bfloat16(), DEVICE)
        self.copy, hidden = random_records(F, D, 4), layer.network.rank
        self.hidden_NR = normal(1, hidden)
        self.fc2 = Rows(layer.network.fc2_q_FR, INT8, (F, hidden))
        self.gate_NF = x_ND @ layer.gate_FD.float().T
        self.h_NF, self.y_ND = torch.empty_like(self.gate_NF), torch.empty_like(x_ND)
        self.kept_NF = cuda.up(x_ND, self.gate_NF, self.up, layer.threshold, self.h_NF).clone()
        score_NF = self.gate_NF + 0.3 * normal(*self.gate_NF.shape)
        least = torch.tensor([layer.threshold - 0.35], device=DEVICE)
        self.selection = Selection(score_NF, least)

    def op(self, kernel: str, tile: Tile) -> Callable[[], object]:
        x_ND, threshold, tiles = self.x_ND, self.layer.threshold, (tile, tile, tile)
        gate_up = partial(cuda.gate_up, x_ND, self.gate, self.up, threshold, self.h_NF)
        calls: dict[str, Callable[..., object]] = {
            "up": partial(cuda.up, x_ND, self.gate_NF, self.up, threshold, self.h_NF),
            "down": partial(cuda.down, self.kept_NF, self.down, self.y_ND, self.buffers),
            "exact": gate_up,
            "predicted": partial(gate_up, self.selection),
            "linear bf16": partial(cuda.linear, x_ND, self.qkv),
            "linear int8": partial(cuda.linear, self.hidden_NR, self.fc2),
            "linear 4 bits": partial(cuda.linear, x_ND, self.copy),
        }
        return partial(calls[kernel], tiles=tiles)


def measure_tiles(args: argparse.Namespace, results: Results) -> None:
    buffers = DownBuffers(
        torch.empty(args.num_neurons // 8 * args.d_model, device=DEVICE),
        torch.zeros(1024, dtype=torch.int32, device=DEVICE),
    )
    x_ND = normal(1, args.d_model)
    layers = make_layers(args, min(args.layers, MAX_LAYERS))
    cases = [Case(layer, x_ND, buffers) for layer in layers]
    x_bf16 = x_ND.bfloat16()
    product = chain_us([partial(F.linear, x_bf16, case.qkv.data) for case in cases], args.repeats)
    say(f"PyTorch's product as wide as q, k and v: {product['us']:.2f} us")
    for kernel in args.kernels:
        rows = []
        for tile in TILES[kernel]:
            row = chain_us([case.op(kernel, tile) for case in cases], args.repeats)
            rows.append((row["us"], tile))
            results.add(measurement="tune", kernel=kernel, tile=vars(tile), **row)
        for us, tile in sorted(rows, key=lambda row: row[0])[:5]:
            say(f"{kernel:13} {us:6.2f} us  {tile}")
