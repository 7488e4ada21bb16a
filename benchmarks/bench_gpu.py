"""Speed of the Triton kernels and of whole decode steps on this GPU, in layers of LLaMA-2-7B.

    python benchmarks/bench_gpu.py --name my-gpu operators ffn widths decode
    python benchmarks/bench_gpu.py --name my-gpu --quick operators      # a smoke test

operators  step 2 (up for active neurons) and step 3 (down for active neurons) of ProSparse's exact
           operators against PyTorch's dense products, by number of tokens
ffn        the whole FFN: dense, exact, and predicted with two kinds of predictor; more tokens than
           the runtime gives to the sparse kernels are given to them here
widths     the kernels on weights in 8 and 4 bits
decode     all layers with attention and head, as CUDA graphs: tokens per second by mode and batch
tune       tiles of the kernels for one token, fastest first

Weights are random; a FATReLU threshold sets the sparsity, rows of unequal size make some neurons
fire more often than others (bench_shapes.py). Parity comes first: an op that is wrong is not timed.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_shapes import add_shape
from gpu_decode import measure_decode_steps
from gpu_layers import EPS, Layer, check, ffns_of, make_layers, normal, random_records
from gpu_tiles import TILES, measure_tiles
from gpu_timing import DEVICE, Results, alone_us, chain_us, copy_bytes_per_s, relative_error, say
from torch import Tensor

from runtime.config import Mode
from runtime.cuda_ffn import CudaSparseFFN
from runtime.kernels import cuda
from runtime.kernels.cuda import DownBuffers, Rows

RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurements", nargs="+", choices=list(MEASUREMENTS))
    parser.add_argument("--name", required=True, help="of the result file: NAME.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="its folder")
    parser.add_argument("--quick", action="store_true", help="fewer layers, batches and repeats")
    add_shape(parser)
    parser.add_argument("--layers", type=int, default=None, help="default: 32, 4 with --quick")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, nargs="+", default=None)
    parser.add_argument("--context", type=int, default=256, help="cached positions in decode")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--kernels", nargs="+", choices=list(TILES), default=list(TILES),
                        help="that tune looks at")  # fmt: skip
    args = parser.parse_args()
    args.layers = args.layers or (4 if args.quick else 32)
    args.batch = args.batch or ([1, 3] if args.quick else [1, 2, 4, 8, 16])
    args.repeats = args.repeats or (5 if args.quick else 30)
    return args


class Operators:
    """Steps 2 and 3 on one layer for N tokens, sparse and dense; right, or there is none."""

    def __init__(self, layer: Layer, x_ND: Tensor, buffers: DownBuffers) -> None:
        self._layer, self._x_ND, self._buffers = layer, x_ND, buffers
        self._x_bf16 = x_ND.bfloat16()
        self._up, self._down = Rows.of(layer.up_FD, DEVICE), Rows.of(layer.down_FD, DEVICE)
        self._gate_NF = x_ND @ layer.gate_FD.float().T
        self._gate_bf16 = self._gate_NF.bfloat16()
        self._h_NF, self._y_ND = torch.empty_like(self._gate_NF), torch.empty_like(x_ND)
        truth_NF = (self._gate_NF > layer.threshold) * self._gate_NF.double()
        truth_NF *= x_ND.double() @ layer.up_FD.double().T
        check(f"step 2, {len(x_ND)} tokens", self.sparse2(), truth_NF)
        self._kept_NF = self._h_NF.clone()
        self._kept_bf16 = self._kept_NF.bfloat16()
        check(f"step 3, {len(x_ND)} tokens", self.sparse3(), truth_NF @ layer.down_FD.double())
        self.active = float((self._kept_NF != 0).any(0).float().mean())

    def sparse2(self) -> Tensor:
        return cuda.up(self._x_ND, self._gate_NF, self._up, self._layer.threshold, self._h_NF)

    def sparse3(self) -> Tensor:
        return cuda.down(self._kept_NF, self._down, self._y_ND, self._buffers)

    def dense2(self) -> Tensor:
        return cuda.activate(self._gate_bf16, self.dense2_product(), self._layer.threshold)

    def dense2_product(self) -> Tensor:
        return F.linear(self._x_bf16, self._layer.up_FD)

    def dense3(self) -> Tensor:
        return F.linear(self._kept_bf16, self._layer.down_DF)

    def dense3_by_rows(self) -> Tensor:
        return self._kept_bf16 @ self._layer.down_FD


# step: its sparse operator, then the dense ones, of which the fastest counts
STEPS = {"2": ("sparse2", "dense2"), "3": ("sparse3", "dense3", "dense3_by_rows")}


def measure_operators(args: argparse.Namespace, results: Results) -> None:
    layers = make_layers(args, 6 if args.quick else 12)
    buffers = DownBuffers.of(args.num_neurons, args.d_model, DEVICE)
    for N in args.batch:
        x_ND = normal(N, args.d_model)
        cases = [Operators(layer, x_ND, buffers) for layer in layers]
        active = sum(case.active for case in cases) / len(cases)
        num_bytes = 2 * active * args.num_neurons * args.d_model

        def timed(name: str, cases: list[Operators] = cases) -> dict[str, float]:
            ops = [getattr(case, name) for case in cases]
            return {**chain_us(ops, args.repeats), "alone_us": alone_us(ops[0], args.repeats)}

        product = timed("dense2_product")
        results.add(measurement="operators", op="dense2_product", tokens=N, **product)
        for step, (sparse, *dense) in STEPS.items():
            by_name = {name: timed(name) for name in (sparse, *dense)}
            us, dense_us = by_name[sparse]["us"], min(by_name[name]["us"] for name in dense)
            for name in dense:
                results.add(measurement="operators", op=name, tokens=N, **by_name[name])
            results.add(
                measurement="operators", op=sparse, tokens=N, active=active,
                times_dense=dense_us / us, gigabytes_per_s=num_bytes / us / 1e3, **by_name[sparse],
            )  # fmt: skip
            alone = [by_name[name]["alone_us"] for name in (sparse, *dense)]
            say(f"step {step}, {N:2} tokens: {us:6.1f} us, dense {dense_us:6.1f} us, "
                f"{dense_us / us:5.2f} x ({min(alone[1:]) / alone[0]:.2f} x alone); "
                f"{active:.1%} active, {num_bytes / us / 1e3:.0f} GB/s")  # fmt: skip


def measure_ffn(args: argparse.Namespace, results: Results) -> None:
    """One FFN with its norm, added to the residual stream, as in a decode step."""
    layers = make_layers(args, 4 if args.quick else 12)
    buffers = DownBuffers.of(args.num_neurons, args.d_model, DEVICE)
    by_path = ffns_of(layers, args, buffers)
    norm_D = torch.ones(args.d_model, device=DEVICE)
    for N in args.batch:
        x_ND = normal(N, args.d_model)
        normed_ND = cuda.rms_norm(x_ND, norm_D, EPS)
        truth_ND = layers[0].true_ffn(normed_ND)
        dense_us = 0.0
        for path, (mode, ffns) in by_path.items():

            def add_to(ffn: CudaSparseFFN, out_ND: Tensor, mode: Mode = mode) -> None:
                if mode == "dense":
                    ffn.add_to(out_ND, norm_D, EPS, mode)
                else:
                    ffn.kernel.add_to(out_ND, cuda.rms_norm(out_ND, norm_D, EPS), mode)

            result_ND = x_ND.clone()
            add_to(ffns[0], result_ND)
            if mode == "exact":  # bf16 products turn neurons near the threshold on and off
                check(f"ffn {path}, {N} tokens", result_ND - x_ND, truth_ND)
            scratch_ND = x_ND.clone()
            row = chain_us([partial(add_to, ffn, scratch_ND) for ffn in ffns], args.repeats)
            dense_us = dense_us or row["us"]
            h_NF = ffns[0].kernel.activations(normed_ND, mode)
            row |= {"active": float((h_NF != 0).any(0).float().mean()),
                    "error": relative_error(result_ND - x_ND, truth_ND)}  # fmt: skip
            if mode == "predicted":
                row["selected"] = float(ffns[0].select(normed_ND).any(0).float().mean())
            results.add(measurement="ffn", path=path, tokens=N, times_dense=dense_us / row["us"],
                        **row)  # fmt: skip
            say(f"ffn {path:21} {N:2} tokens: {row['us']:6.1f} us, {dense_us / row['us']:5.2f} x; "
                f"{row['active']:.1%} active")  # fmt: skip


def measure_widths(args: argparse.Namespace, results: Results) -> None:
    """Against the same kernels with every neuron active: PyTorch has no such dense product."""
    D, num_neurons, device = args.d_model, args.num_neurons, DEVICE
    buffers = DownBuffers.of(num_neurons, D, device)
    for bits in (8, 4):
        layers = [[random_records(num_neurons, D, bits) for _ in range(3)] for _ in range(12)]
        for N in [N for N in args.batch if N <= cuda.FEW_TOKENS]:
            x_ND, h_NF, y_ND = normal(N, D), normal(N, num_neurons), normal(N, D)
            gates = cuda.linear(x_ND, layers[0][0]).flatten().sort().values
            sparse = float(gates[int(args.sparsity * (len(gates) - 1))])
            all_us = 0.0
            for name, threshold in (("all", -1e9), ("sparse", sparse)):

                def run(layer: list[Rows], threshold: float = threshold) -> None:
                    gate, up, down = layer
                    cuda.gate_up(x_ND, gate, up, threshold, h_NF)  # noqa: B023
                    cuda.down(h_NF, down, y_ND, buffers)  # noqa: B023

                row = chain_us([partial(run, layer) for layer in layers], args.repeats)
                all_us = all_us or row["us"]
                active = float((h_NF != 0).any(0).float().mean())
                num_bytes = (1 + 2 * active) * layers[0][0].data.numel()
                results.add(measurement="widths", bits=bits, path=name, tokens=N, active=active,
                            times_all=all_us / row["us"],
                            gigabytes_per_s=num_bytes / row["us"] / 1e3, **row)  # fmt: skip
                say(f"{bits} bits, {name:6}, {N:2} tokens: {row['us']:6.1f} us, "
                    f"{all_us / row['us']:5.2f} x; {active:.1%} active, "
                    f"{num_bytes / row['us'] / 1e3:.0f} GB/s")  # fmt: skip


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "operators": measure_operators,
    "ffn": measure_ffn,
    "widths": measure_widths,
    "decode": measure_decode_steps,
    "tune": measure_tiles,
}


def main() -> int:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: there is nothing to measure")
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = Results(args.out / f"{args.name}.json", settings | {"command": " ".join(sys.argv)})
    with torch.inference_mode():
        bandwidth = copy_bytes_per_s(args.repeats)
        torch.cuda.empty_cache()
        results.add(measurement="copy", gigabytes_per_s=bandwidth / 1e9)
        say(f"copy within the device: {bandwidth / 1e9:.0f} GB/s read and written")
        for name in args.measurements:
            say(name)
            MEASUREMENTS[name](args, results)
            torch.cuda.empty_cache()
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
