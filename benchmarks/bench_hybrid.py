"""Decode of a model that does not fit: hybrid against dense split by layers, and against the CPU.

    python benchmarks/bench_hybrid.py --name my-machine            # LLaMA-2-7B; a quarter fits
    python benchmarks/bench_hybrid.py --name my-machine --quick    # eight of its layers

Random weights in bf16 with natural sparsity as asked; rows of unequal size make some neurons fire
far more often than others. Networks that know the gates but for some noise predict them. Batch 1.
    dense split    as many whole layers on the accelerator as fit, the others on the CPU
    sparse, CPU    predicted mode, everything on the CPU
    hybrid         predicted mode, as the planner places it from this machine's measured costs
Parity first: each layer must give what it gives on the CPU but for rounding (hybrid_parity.py). The
result file is written anew after each part, so that a run that is cut short leaves what it has.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_shapes import Gate, add_shape, threshold_for
from hybrid_parity import MAX_LAYER_ERROR, layer_errors
from torch import Tensor

from hotneuron import machine
from predictor import PredictorSet
from runtime.accelerator import new_accelerator
from runtime.config import Mode, ModelConfig, usable_cpus
from runtime.hybrid import HybridFFN, LayerTrace
from runtime.kernels import cpu
from runtime.loader import FfnWeights, LayerWeights, ModelWeights
from runtime.measure import measure
from runtime.model import Model
from runtime.planner import Plan, Planner
from runtime.workload import Workload

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
WORKSPACE_BYTES = 144 * MIB  # of the accelerator's libraries and buffers
PROMPT = 4
PARITY_TOKENS = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the result file: NAME.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_shape(parser, skew=0.5, hidden=512)
    parser.add_argument("--layers", type=int, default=None, help="default: 32, with --quick 8")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=128, help="cached tokens")
    parser.add_argument("--budget-share", type=float, default=0.25, help="of the model's bytes")
    parser.add_argument("--new-tokens", type=int, default=None, help="default: 32, with --quick 12")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="under 25 s: do all parts run?")
    args = parser.parse_args()
    args.layers = args.layers or (8 if args.quick else 32)
    args.new_tokens = args.new_tokens or (12 if args.quick else 32)
    return args


class Shape:
    """The model: weights on the host, predictors, and how often each neuron fires."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = torch.device(args.device)
        self._random = torch.Generator(self._device).manual_seed(0)
        self._pages = cpu.HugePages()
        size_LF = self._normal(args.layers, args.num_neurons).mul_(args.skew).exp_()
        self._size_LF = size_LF.sort(dim=1, descending=True).values  # neurons lie hot-first
        threshold = threshold_for(self._size_LF.flatten().cpu(), args.sparsity)
        self.frequency_LF = (0.5 * torch.erfc(threshold / self._size_LF / 2**0.5)).cpu()
        predictors, layers, ffns = [], [], []
        D = args.d_model
        for l in range(args.layers):
            gate = Gate(self._size_LF[l], threshold, args, self._random)
            predictors.append(gate.network().to("cpu"))
            gate_FD = gate.weight_FD.bfloat16()
            up_FD, down_FD = self._matrix(len(gate_FD), D), self._matrix(len(gate_FD), D, 0.5)
            ffns.append(FfnWeights(self._kept(gate_FD), self._kept(up_FD), self._kept(down_FD)))
            matrices = self._kept(self._matrix(3 * D, D)), self._kept(self._matrix(D, D, 0.5))
            layers.append(LayerWeights(torch.ones(D), *matrices, torch.ones(D)))
        self.predictors = PredictorSet(predictors)
        embed_VD, head_VD = self._matrix(args.vocab, D, D**0.5), self._matrix(args.vocab, D)
        self.weights = ModelWeights(
            self._kept(embed_VD), tuple(layers), tuple(ffns), torch.ones(D), self._kept(head_VD)
        )
        self.config = ModelConfig.from_hf(
            {
                "num_hidden_layers": args.layers, "hidden_size": D, "vocab_size": args.vocab,
                "intermediate_size": args.num_neurons, "num_attention_heads": args.heads,
                "hidden_act": "relu", "hidden_act_param": threshold, "eos_token_id": 2,
                "max_position_embeddings": args.context,
            }
        )  # fmt: skip

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, device=self._device)

    def _matrix(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        shape = (rows, columns)
        values = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return values.normal_(0.0, gain / columns**0.5, generator=self._random)

    def _kept(self, matrix_OD: Tensor) -> Tensor:
        return self._pages.copy(matrix_OD)

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        w = self.weights
        ffns = sum(f.gate_FD.nbytes + f.up_FD.nbytes + f.down_FD.nbytes for f in w.ffns)
        layers = sum(layer.qkv_OD.nbytes + layer.out_DO.nbytes for layer in w.layers)
        return int(ffns + layers + w.embed_VD.nbytes + w.head_VD.nbytes)

    def model(self, device: str, plan: Plan | None) -> Model:
        return Model(
            self.config,
            self.weights,
            dtype=torch.bfloat16,
            device=torch.device(device),
            kernels="cpu",
            predictors=self.predictors,
            placement=None if plan is None else plan.placement,
            max_context=self._args.context,
            max_batch=1,
        )

    def workload(self, mode: Mode) -> Workload:
        args, first = self._args, self.weights.layers[0]
        return Workload(
            self.frequency_LF,
            row_bytes=2 * args.d_model,
            attention_bytes=first.qkv_OD.nbytes + first.out_DO.nbytes,
            kv_bytes=2 * 2 * args.context * args.d_model,
            predictor_bytes=self.predictors.layers[0].num_bytes if mode == "predicted" else 0,
            head_bytes=self.weights.head_VD.nbytes,
            mode=mode,
            hot_is_sparse=args.device.startswith("cuda"),
        )


def tokens_of(args: argparse.Namespace, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(args.vocab, (count,), generator=generator).tolist()


@torch.inference_mode()
def run(model: Model, mode: Mode, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Seconds per token, and the logits of each, after as many steps as recording takes."""
    warm, count = 6, args.new_tokens
    ids = tokens_of(args, PROMPT + warm + count)
    cache = model.new_cache(args.context)
    model.prefill(ids[:PROMPT], cache)
    seconds, logits = [], []
    for token in ids[PROMPT:]:
        start = time.perf_counter()
        logits_V = model.decode([token], [cache], mode)[0].to("cpu", copy=True)
        seconds.append(time.perf_counter() - start)
        logits.append(logits_V)
    kept = sorted(seconds[warm:])
    result = {
        "ms_per_token": 1e3 * statistics.median(kept),
        "ms_min": 1e3 * kept[0],
        "ms_max": 1e3 * kept[-1],
        "tokens_per_s": 1 / statistics.median(kept),
        "tokens": len(kept),
        "warm_up_ms": [1e3 * s for s in seconds[:warm]],
    }
    return result, torch.stack(logits)


@torch.inference_mode()
def time_split(model: Model, mode: Mode, args: argparse.Namespace) -> dict[str, Any]:
    """Of one more sequence's steps, layer by layer in ms: the mean over tokens."""
    splits = [layer.ffn for layer in model.layers if isinstance(layer.ffn, HybridFFN)]
    if not splits:
        return {}
    exchange = splits[0].exchange
    cache = model.new_cache(args.context)
    ids = tokens_of(args, 8 + PROMPT)
    model.prefill(ids[:PROMPT], cache)
    for token in ids[PROMPT:]:
        model.decode([token], [cache], mode)
    steps: list[list[dict[str, float]]] = []
    for token in ids[:8]:
        exchange.traces = traces = list[LayerTrace]()
        model.decode([token], [cache], mode).cpu()
        exchange.traces = None
        befores = [None, *(trace.joined for trace in traces)]
        steps.append([t.seconds(b) for t, b in zip(traces, befores, strict=False)])
    names = steps[0][0]
    layers = [
        {name: 1e3 * statistics.mean(step[i][name] for step in steps) for name in names}
        for i in range(len(steps[0]))
    ]
    totals = {name: sum(layer[name] for layer in layers) for name in names}
    alone = totals["gpu"] + totals["cpu"] + totals["transfer"]
    return {
        "layers": layers,
        "total_ms": totals,
        "gpu_and_cpu_one_after_the_other_ms": alone,
        "both_at_once_ms": totals["both"],
    }


def describe(plan: Plan) -> dict[str, Any]:
    homes = plan.placement.home_L
    return {
        "modelled_ms": 1e3 * plan.seconds,
        "bytes": plan.bytes,
        "homes": {name: homes.count(name) for name in ("accelerator", "streamed", "host")},
        "home_L": list(homes),
        "num_hot_L": list(plan.placement.num_hot_L),
    }


def forget(args: argparse.Namespace) -> None:
    """Of models that are gone: give their memory back, and count peaks anew."""
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(args: argparse.Namespace) -> dict[str, int] | None:
    if not args.device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "driver_used": total - free,
    }


class Report:
    """The result file, written anew with every part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path, self._start = args.out / f"{args.name}.json", time.perf_counter()
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.result: dict[str, Any] = {**machine.facts(), "settings": settings}

    def add(self, **parts: Any) -> None:
        self.result |= parts
        self.result["seconds"] = time.perf_counter() - self._start
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.result, indent=2) + "\n")
        print(f"[{self.result['seconds']:6.1f} s] {', '.join(parts)}", flush=True)


def main() -> int:
    args = parse_arguments()
    threads = args.threads or usable_cpus()
    cpu.set_num_threads(threads)
    torch.set_num_threads(threads)
    report = Report(args)
    report.add(threads=threads, isa=cpu.isa())
    rates = measure(new_accelerator(torch.device(args.device)), args.d_model)
    costs = rates.costs(1 - args.sparsity)
    report.add(rates=asdict(rates))
    shape = Shape(args)
    forget(args)
    budget = int(args.budget_share * shape.num_bytes)
    for_layers = budget - shape.weights.head_VD.nbytes - WORKSPACE_BYTES
    report.add(model_bytes=shape.num_bytes, budget_bytes=budget, memory_before=memory(args))

    cpu_model = shape.model("cpu", None)
    cpu_result, cpu_logits = run(cpu_model, "predicted", args)
    F = args.num_neurons
    for i, name in enumerate(("selected", "active")):
        counts = [layer.ffn.kernel.last_counts[i] for layer in cpu_model.layers]  # type: ignore[attr-defined]
        cpu_result[name] = float(torch.cat(counts).double().mean()) / F
    report.add(sparse_cpu=cpu_result)
    del cpu_model
    forget(args)

    dense_plan = Planner(shape.workload("dense"), costs, for_layers).split_by_layers()
    dense_model = shape.model(args.device, dense_plan)
    dense_result, _ = run(dense_model, "dense", args)
    report.add(dense_split=dense_result | {"plan": describe(dense_plan)})
    del dense_model
    forget(args)

    planner = Planner(shape.workload("predicted"), costs, for_layers)
    plan = planner.best()
    report.add(modelled={"hybrid": describe(plan), "all_cpu_ms": 1e3 * planner.all_host().seconds})
    model = shape.model(args.device, plan)
    result, logits = run(model, "predicted", args)
    error = float((logits - cpu_logits).norm() / cpu_logits.norm())
    errors = layer_errors(
        model, shape.model("cpu", None), tokens_of(args, PARITY_TOKENS), args.context
    )
    report.add(hybrid=result, parity={"layer_errors": errors, "logits_error": error})
    report.add(
        memory_hybrid=memory(args),
        speedup={
            "over_dense_split": dense_result["ms_per_token"] / result["ms_per_token"],
            "over_sparse_cpu": cpu_result["ms_per_token"] / result["ms_per_token"],
        },
    )
    report.add(time_split=time_split(model, "predicted", args))
    for name in ("sparse_cpu", "dense_split", "hybrid"):
        print(f"{name:12} {report.result[name]['tokens_per_s']:8.2f} tokens/s")
    worst = max(errors)
    print(json.dumps(report.result["speedup"]), f"worst layer error {worst:.3g}")
    if not worst <= MAX_LAYER_ERROR:
        print(f"a hybrid layer is off by {worst:.3f}: its speed does not count", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
