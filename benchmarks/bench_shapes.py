"""Decode of models with random weights, of a given shape and sparsity: what larger ones would do.

    python benchmarks/bench_shapes.py --name my-machine               # six layers of LLaMA-2-7B
    python benchmarks/bench_shapes.py --name my-machine --layers 32   # all of it: 14 GB in bf16

Random matrices make the gates normal, so a FATReLU threshold sets how many neurons fire; rows of
unequal size make some fire far more often than others, as in trained models. `predicted` runs with
three kinds of predictor: 4-bit copies of the gates, and networks of --hidden units (PowerInfer's
have 1024 for a model of this size) in 8 and in 4 bits, for which the gates are made predictable: of
rank --hidden / 2 but for a share of noise. Each kind runs beside dense and exact runs of the same
weights in memory. Parity comes first: exact must give dense's greedy tokens.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from results_file import write_result
from safetensors.torch import save_file
from torch import Tensor

PREDICTORS = ["gate-int4", "mlp", "mlp-int4"]
PARITY_TOKENS = 8
PROMPT_TOKENS = 16
ONE_SIDED_95 = 1.645


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    add_shape(parser)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--predictors", nargs="+", choices=PREDICTORS, default=PREDICTORS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def add_shape(parser: argparse.ArgumentParser, *, skew: float = 0.3, hidden: int = 1024) -> None:
    """The arguments that say what a layer is like: by default as LLaMA-2-7B's."""
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--num-neurons", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.89)
    parser.add_argument("--skew", type=float, default=skew, help="of row sizes: sigma of their log")
    parser.add_argument("--hidden", type=int, default=hidden, help="units of the mlp predictors")
    parser.add_argument("--noise", type=float, default=0.05, help="share of the gates' variance")


def threshold_for(size_F: Tensor, sparsity: float) -> float:
    """Above it lies 1 - sparsity of all gates, each normal with its row's size as deviation."""
    low, high = 0.0, 20.0 * float(size_F.max())
    for _ in range(60):
        middle = (low + high) / 2
        share = float(0.5 * torch.erfc(middle / size_F / 2**0.5).mean())
        low, high = (middle, high) if share > 1 - sparsity else (low, middle)
    return low


class Gate:
    """One layer's gates, of low rank but for noise, and the network that knows the low rank."""

    def __init__(
        self,
        size_F: Tensor,
        threshold: float,
        args: argparse.Namespace,
        generator: torch.Generator,
    ) -> None:
        D, F, R = args.d_model, args.num_neurons, args.hidden // 2
        self.size_F, self.threshold, self._noise = size_F, threshold, args.noise**0.5
        self.in_RD = _normal(generator, R, D) / D**0.5
        clean = (1 - args.noise) ** 0.5 / R**0.5
        self.out_FR = size_F[:, None] * clean * _normal(generator, F, R)
        noise = self._noise * size_F[:, None] / D**0.5
        self.weight_FD = (self.out_FR @ self.in_RD).add_(noise * _normal(generator, F, D))

    @classmethod
    def of_random_sizes(cls, args: argparse.Namespace, generator: torch.Generator) -> "Gate":
        size_F = (args.skew * _normal(generator, args.num_neurons)).exp()
        return cls(size_F, threshold_for(size_F, args.sparsity), args, generator)

    def network(self) -> Any:
        """relu(u) - relu(-u) = u; a neuron is selected if it fires at 5 % chance of the noise."""
        from predictor import MlpPredictor

        margin_F = ONE_SIDED_95 * self._noise * self.size_F
        return MlpPredictor.from_float(
            torch.cat([self.in_RD, -self.in_RD]),
            torch.zeros(2 * len(self.in_RD), device=self.in_RD.device),
            torch.cat([self.out_FR, -self.out_FR], dim=1),
            margin_F - self.threshold,
        )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def write_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the predictors by their kind."""
    from predictor import PredictorSet
    from predictor.kinds import GateCopy
    from predictor.mlp import Int4MlpPredictor

    D, F, H, L = args.d_model, args.num_neurons, args.heads, args.layers
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain / columns**0.5).bfloat16()

    files, thresholds = {}, []
    copies, networks = [], []
    for l in range(L):
        name = f"model.layers.{l}."
        gate = Gate.of_random_sizes(args, generator)
        thresholds.append(gate.threshold)
        copies.append(GateCopy.of(gate.weight_FD, 4, gate.threshold))
        networks.append(gate.network())
        tensors = {
            name + "mlp.gate_proj.weight": gate.weight_FD.bfloat16(),
            name + "mlp.up_proj.weight": matrix(F, D),
            name + "mlp.down_proj.weight": matrix(D, F, 0.5),
            name + "input_layernorm.weight": torch.ones(D),
            name + "post_attention_layernorm.weight": torch.ones(D),
        }
        for projection in "qkvo":
            tensors[f"{name}self_attn.{projection}_proj.weight"] = matrix(D, D, 0.5)
        save_file(tensors, folder / f"layer-{l}.safetensors")
        files |= dict.fromkeys(tensors, f"layer-{l}.safetensors")
    ends = {
        "model.embed_tokens.weight": matrix(args.vocab_size, D, D**0.5),
        "lm_head.weight": matrix(args.vocab_size, D),
        "model.norm.weight": torch.ones(D),
    }
    save_file(ends, folder / "ends.safetensors")
    files |= dict.fromkeys(ends, "ends.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {
        "model_type": "llama", "num_hidden_layers": L, "hidden_size": D, "intermediate_size": F,
        "num_attention_heads": H, "num_key_value_heads": H, "head_dim": D // H,
        "vocab_size": args.vocab_size, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "relu",
        "hidden_act_param": thresholds,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    in_4_bits = [Int4MlpPredictor.of(network) for network in networks]
    kinds = {"gate-int4": copies, "mlp": networks, "mlp-int4": in_4_bits}
    return {kind: PredictorSet(kinds[kind]) for kind in args.predictors}


def leave_page_cache(folder: Path) -> None:
    """What the system keeps of the files would leave the next model no huge pages."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shares(model: Any) -> dict[str, float]:
    """Of the last decode step, mean over layers and tokens: selected and active neurons."""
    counts = [layer.ffn.kernel.last_counts for layer in model.layers]
    F = model.config.num_neurons
    selected, active = (
        float(torch.stack([c[i] for c in counts]).double().mean()) / F for i in (0, 1)
    )
    return {"selected": selected, "active": active}


def measure_width(
    folder: Path, kind: str, predictors: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for name, layers in predictors.items():
        rows += measure_predictor(folder, kind, name, layers, args)
        gc.collect()  # the model is in cycles, and the next one needs its memory
    return rows


def measure_predictor(
    folder: Path, kind: str, predictor: str, layers: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    from parity import greedy

    from runtime.config import WEIGHT_BITS
    from runtime.model import Model
    from runtime.speed import measure_decode, random_prompt

    model = Model.from_folder(
        folder, kernels="cpu", weight_bits=WEIGHT_BITS[kind], predictors=layers
    )
    leave_page_cache(folder)
    prompt = random_prompt(args.vocab_size, PROMPT_TOKENS)
    tokens = [greedy(model, mode, prompt, PARITY_TOKENS) for mode in ("exact", "dense")]
    if tokens[0] != tokens[1]:
        raise SystemExit(f"{kind}: exact and dense give different tokens; nothing was timed")
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for batch in args.batch:
            for mode in ("dense", "exact", "predicted"):
                result = measure_decode(model, mode, batch, prompt, args.new_tokens)  # type: ignore[arg-type]
                found.setdefault((batch, mode), []).append(result | shares(model))
    rows = []
    for (batch, mode), results in found.items():
        speeds = [result["tokens_per_s"] for result in results]
        dense = statistics.median(result["tokens_per_s"] for result in found[batch, "dense"])
        row = {
            "weights": kind,
            "batch": batch,
            "predictor": predictor,
            "mode": mode,
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_min": min(speeds),
            "tokens_per_s_max": max(speeds),
            "times_dense": statistics.median(speeds) / dense,
            **{share: results[-1][share] for share in ("selected", "active")},
        }
        print(
            f"{kind:5} batch {batch:2} {predictor:13} {mode:9} {row['tokens_per_s']:8.2f} tokens/s "
            f"{row['times_dense']:5.2f} x dense, {row['selected']:.1%} selected, "
            f"{row['active']:.1%} active",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hotneuron import machine
    from runtime.config import usable_cpus
    from runtime.kernels import cpu

    threads = args.threads or usable_cpus()
    cpu.set_num_threads(threads)
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"writing {args.layers} layers of random weights", file=sys.stderr)
        predictors = write_model(folder, args)
        for kind in args.weights:
            rows += measure_width(folder, kind, predictors, args)
    settings = {name: value for name, value in vars(args).items() if name != "name"}
    result = {**machine.facts(), "settings": settings | {"threads": threads}, "results": rows}
    write_result(args.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
