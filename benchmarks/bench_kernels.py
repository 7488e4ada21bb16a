"""Time and bytes per second of the C++ kernels, by active share, against this machine's read speed.

    python benchmarks/bench_kernels.py --name my-machine --active 1 5 10 20 50 100

Parity with the reference comes first; without it nothing is timed. Each op walks over `--layers`
layers of weights of their own, as a decode step does. Bytes are what the op has to read: for the
FFN, with a = active and p = predicted share, dense 3, exact 1 + 2a, predicted p + 2a times F x D,
plus the predictor. Caches hold part of what is walked over, so an op is compared with the speed of
plain reading over as many bytes as it walks over in all.
"""

import argparse
from itertools import cycle
from typing import Any

import numpy as np
import torch
from results_file import write_result
from torch import Tensor

from hotneuron import machine
from predictor import MlpPredictor
from predictor.low_bits import rounded_inputs
from predictor.mlp import Int4MlpPredictor
from runtime.kernels import cpu, reference
from runtime.kernels.quantized import QuantizedMatrix, Weight, side_by_side
from runtime.measure import median_seconds

MIB = 1024 * 1024
READ_MIB = (16, 32, 64, 128, 256, 512, 1024, 2048)  # over which plain reading is timed
MIN_CALLS = 5
Triple = tuple[Weight, Weight, Weight]  # gate, up, down
FALSE_POSITIVES = 0.5  # selected but not active, as a share of the active ones


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--name", default=None, help="of the result file: results/NAME.json")
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--num-neurons", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=64, help="of the predictors, mlp-int4")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1, help="in one call")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8", "int4"), nargs="+",
                        default=["bf16", "int8", "int4"])  # fmt: skip
    parser.add_argument("--active", type=float, nargs="+", default=[1, 5, 10, 20, 50, 100],
                        help="active shares in percent")  # fmt: skip
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--isa", default=None, help="amx, avx512vnni, avx512, avx2 or generic; default: best"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--no-pack", action="store_true", help="weights in ordinary pages")
    return parser.parse_args()


def read_speeds(seconds: float) -> dict[int, float]:
    """Bytes per second of our own dot product with one long vector, by how many bytes there are."""
    columns = 16384
    wide_OD = cpu.pack([torch.ones(READ_MIB[-1] * MIB // (4 * columns), columns)])[0]
    x_ND = torch.ones(1, columns)
    speeds = {}
    for size in READ_MIB:
        part_OD = wide_OD[: size * MIB // (4 * columns)]
        y_NO = torch.empty(1, len(part_OD))
        call = lambda part_OD=part_OD, y_NO=y_NO: cpu.linear(x_ND, part_OD, y_NO)  # noqa: E731
        speeds[size * MIB] = size * MIB / median_seconds(call, seconds, MIN_CALLS)
    return speeds


def read_speed_over(num_bytes: float, speeds: dict[int, float]) -> float:
    """Between the measured sizes, by the logarithm of the size."""
    sizes = np.log(np.array(list(speeds)))
    return float(np.interp(np.log(num_bytes), sizes, np.array(list(speeds.values()))))


class Layer:
    """Weights of one layer, and an FFN of them with a given share of active neurons."""

    def __init__(self, x_ND: Tensor, weights: Triple) -> None:
        self.x_ND, self.weights = x_ND, weights
        seen_ND = x_ND if isinstance(weights[0], Tensor) else rounded_inputs(x_ND)
        self.gate_NF = reference.linear(seen_ND, weights[0].float())

    def ffn(self, active_share: float, rank: int) -> cpu.CpuFfn:
        F, D = self.weights[0].shape
        threshold = float(self.gate_NF.flatten().quantile(1 - active_share)) - 1e-6
        active_F = (self.gate_NF > threshold).any(0)
        selected_F = active_F | (torch.rand(F) < FALSE_POSITIVES * active_share)
        network = MlpPredictor.from_float(
            torch.randn(rank, D) / D**0.5,
            torch.zeros(rank),
            torch.randn(F, rank) * 1e-4,
            torch.where(selected_F, 1.0, -1.0),
        )
        self.predictor = Int4MlpPredictor.of(network)
        return cpu.CpuFfn(*self.weights, threshold, self.predictor)


def check_parity(layer: Layer, ffn: cpu.CpuFfn, threshold_share: float) -> None:
    """Stops unless all modes agree with the reference and with each other."""
    dense_ND = ffn.forward(layer.x_ND, "dense")
    exact_ND = ffn.forward(layer.x_ND, "exact")
    predicted_ND = ffn.forward(layer.x_ND, "predicted")
    if not torch.equal(dense_ND, exact_ND):
        raise SystemExit("parity: exact and dense differ; nothing was timed")
    h_NF = ffn.activations(layer.x_ND)
    mask_NF = ffn.select(layer.x_ND)
    down_FD = layer.weights[2].float().double()
    for name, result_ND, h in (
        ("dense", dense_ND, h_NF),
        ("predicted", predicted_ND, torch.where(mask_NF, h_NF, 0.0)),
    ):
        truth_ND = h.double() @ down_FD
        scale = float((h.double().abs() @ down_FD.abs()).max())
        error = float((result_ND.double() - truth_ND).abs().max())
        if not error <= 1e-6 * (1 + scale):
            raise SystemExit(
                f"parity: {name} at {threshold_share:.0%} active is off by {error:.2e}"
            )
    gate_error = (cpu.linear(layer.x_ND, layer.weights[0]) - layer.gate_NF).abs().max()
    if not float(gate_error) <= 1e-5 * float(layer.gate_NF.abs().max()):
        raise SystemExit(f"parity: linear is off by {float(gate_error):.2e}")


def stored(weight_OD: Tensor, kind: str) -> Weight:
    if kind in ("fp32", "bf16"):
        return weight_OD.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    return QuantizedMatrix.of(weight_OD, 8 if kind == "int8" else 4)


def packed(gate_FD: Weight, up_FD: Weight, down_FD: Weight, memory: cpu.HugePages) -> Triple:
    """As the loader stores them."""
    up_and_down = side_by_side(up_FD, down_FD, memory.copy)
    if isinstance(gate_FD, Tensor):
        return memory.copy(gate_FD), *up_and_down
    rows_OB = memory.copy(gate_FD.rows_OB)
    return QuantizedMatrix(rows_OB, gate_FD.bits, gate_FD.shape[1]), *up_and_down


def make_layers(arguments: argparse.Namespace, kind: str) -> list[Layer]:
    F, D = arguments.num_neurons, arguments.d_model
    x_ND = torch.randn(arguments.tokens, D)
    memory = cpu.HugePages()
    layers = []
    for _ in range(arguments.layers):
        gate, up, down = (stored(torch.randn(F, D) / D**0.5, kind) for _ in range(3))
        triple = (gate, up, down) if arguments.no_pack else packed(gate, up, down, memory)
        layers.append(Layer(x_ND, triple))
    return layers


def measure(arguments: argparse.Namespace, layers: list[Layer]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    F = arguments.num_neurons
    unit = layers[0].weights[0].nbytes
    x_ND = layers[0].x_ND
    gates = cycle([layer.weights[0] for layer in layers])
    y_NF = torch.empty(arguments.tokens, F)
    rows.append(
        {
            "op": "linear",
            "active": None,
            "bytes": unit,
            "seconds": median_seconds(
                lambda: cpu.linear(x_ND, next(gates), y_NF), arguments.seconds, MIN_CALLS
            ),
        }
    )
    out_ND = torch.empty_like(x_ND)
    for percent in arguments.active:
        ffns = [layer.ffn(percent / 100, arguments.rank) for layer in layers]
        check_parity(layers[0], ffns[0], percent / 100)
        selected_N, active_N = ffns[0].last_counts
        a, p = float(active_N.sum()) / F, float(selected_N.sum()) / F  # summed over the tokens
        predictor_bytes = layers[0].predictor.num_bytes
        volumes = {
            "dense": 3.0 * unit,
            "exact": unit * (1 + 2 * min(1.0, a)),
            "predicted": unit * (min(1.0, p) + 2 * min(1.0, a)) + predictor_bytes,
        }
        for mode, volume in volumes.items():
            ring = cycle(ffns)

            def call(ring: Any = ring, mode: Any = mode) -> None:
                next(ring).forward(x_ND, mode, out_ND)

            seconds = median_seconds(call, arguments.seconds, MIN_CALLS)
            rows.append(
                {"op": f"ffn {mode}", "active": percent, "bytes": volume, "seconds": seconds}
            )
    return rows


def report(rows: list[dict[str, Any]], kind: str, num_layers: int, reads: dict[int, float]) -> None:
    """Adds to each row what it compares to, and prints it."""
    dense = {row["active"]: row["seconds"] for row in rows if row["op"] == "ffn dense"}
    print(
        f"{kind:<5} {'op':<14} {'active':>7} {'us':>9} {'GB/s':>7} {'of read':>8} {'vs dense':>9}"
    )
    for row in rows:
        row["weights"] = kind
        row["bytes_per_second"] = row["bytes"] / row["seconds"]
        row["read_bytes_per_second"] = read_speed_over(row["bytes"] * num_layers, reads)
        row["of_read"] = row["bytes_per_second"] / row["read_bytes_per_second"]
        active = "" if row["active"] is None else f"{row['active']:g}%"
        ratio = "" if row["active"] is None else f"{dense[row['active']] / row['seconds']:.2f}x"
        print(
            f"{kind:<5} {row['op']:<14} {active:>7} {row['seconds'] * 1e6:>9.1f} "
            f"{row['bytes_per_second'] / 1e9:>7.1f} {row['of_read']:>8.0%} {ratio:>9}"
        )


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    cpu.set_num_threads(arguments.threads)
    cpu.force_isa(arguments.isa)
    torch.set_num_threads(cpu.num_threads())
    reads = read_speeds(arguments.seconds)
    for size, speed in reads.items():
        print(f"reading {size // MIB:5} MiB: {speed / 1e9:5.1f} GB/s")
    rows = []
    for kind in arguments.weights:
        found = measure(arguments, make_layers(arguments, kind))
        report(found, kind, arguments.layers, reads)
        rows += found
    if arguments.name is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "name"}
        settings |= {"isa": cpu.isa(), "threads": cpu.num_threads()}
        result = {
            **machine.facts(),
            "settings": settings,
            "read_bytes_per_second": {str(size): speed for size, speed in reads.items()},
            "results": rows,
        }
        write_result(arguments.name, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
