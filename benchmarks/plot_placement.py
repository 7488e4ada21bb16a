"""What the planner expects of hybrid decode by share of the model that fits: docs/placement.png.

    python benchmarks/plot_placement.py

Nothing is run: speeds are those of the planner's own model (runtime/planner.py), with bandwidths
from data sheets of three machines and activations skewed as in trained ReLU models.
"""

import json
from pathlib import Path
from typing import Any

import torch
from bench_shapes import threshold_for

from runtime import planner as planner_module
from runtime.planner import Planner
from runtime.workload import MachineCosts, Workload

ROOT = Path(__file__).parent.parent
SHARES = (0.1, 0.175, 0.25, 0.4, 0.6, 0.8, 1.0)
SPARSITY, SKEW = 0.89, 0.5
EFFICIENCY = 0.8  # of a data sheet's bandwidth that reading reaches
SYNC_S, LAYER_S = 40e-6, 33e-6  # as measured beside an H100
CONTEXT, RANK, VOCAB = 1024, 512, 32000
WORKSPACE = 192 << 20
# bytes per second of the accelerator's memory, the host's, and the link between them
MACHINES = {
    "laptop: RTX 4060 8 GB, DDR5-5600": (256e9, 89.6e9, 16e9),
    "desktop: RTX 4090, DDR5-6000": (1008e9, 96e9, 32e9),
    "old desktop: GTX 1080, DDR4-2666": (320e9, 42.7e9, 15.8e9),
}
SHAPES = {"7B": (32, 4096, 11008), "13B": (40, 5120, 13824)}


def frequencies(num_layers: int, num_neurons: int) -> torch.Tensor:
    """Gates are normal, rows of unequal size: 46 % of the neurons make 80 % of the activations."""
    generator = torch.Generator().manual_seed(0)
    size_LF = (SKEW * torch.randn(num_layers, num_neurons, generator=generator)).exp()
    return 0.5 * torch.erfc(threshold_for(size_LF.flatten(), SPARSITY) / size_LF / 2**0.5)


def workloads(shape: str) -> tuple[Workload, Workload, int]:
    """(predicted, dense, bytes of the whole model)."""
    L, D, F = SHAPES[shape]
    facts: dict[str, Any] = {
        "row_bytes": 2 * D,
        "attention_bytes": 2 * 4 * D * D,
        "kv_bytes": 2 * 2 * CONTEXT * D,
        "head_bytes": 2 * VOCAB * D,
    }
    frequency_LF = frequencies(L, F)
    facts |= {"hot_is_sparse": True}
    predicted = Workload(frequency_LF, predictor_bytes=RANK * (D + F), mode="predicted", **facts)
    dense = Workload(frequency_LF, mode="dense", **facts)
    layer = facts["attention_bytes"] + F * predicted.neuron_bytes
    return predicted, dense, L * layer + 2 * facts["head_bytes"]


# A curve needs no more: the plans of neighbouring points differ by more than this.
planner_module.SOLVER_LIMITS.update(time_limit=3.0, mip_rel_gap=1e-2)


def study() -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        predicted, dense, model_bytes = workloads(shape)
        for machine, (hot, host, link) in MACHINES.items():
            hot, host, link = (EFFICIENCY * rate for rate in (hot, host, link))
            costs = MachineCosts(hot, host, host, link, SYNC_S, LAYER_S)
            for share in SHARES:
                left = int(share * model_bytes) - predicted.head_bytes - WORKSPACE
                if left < 0:
                    continue
                planner = Planner(predicted, costs, left)
                plan = planner.best()
                homes = plan.placement.home_L
                row = {
                    "shape": shape,
                    "machine": machine,
                    "share": share,
                    "hybrid": 1 / plan.seconds,
                    "dense_split": 1 / Planner(dense, costs, left).split_by_layers().seconds,
                    "all_cpu": 1 / planner.cpu_seconds(),
                    "hot_share": sum(plan.placement.num_hot_L) / predicted.frequency_LF.numel(),
                    "streamed": homes.count("streamed"),
                    "host": homes.count("host"),
                }
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
                rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(10, 4.2), sharey=True)
    for ax, shape in zip(axes, SHAPES, strict=True):
        for colour, machine in zip(("C0", "C1", "C2"), MACHINES, strict=True):
            mine = [r for r in rows if r["machine"] == machine and r["shape"] == shape]
            shares = [100 * r["share"] for r in mine]
            ax.plot(shares, [r["hybrid"] for r in mine], colour, marker=".", label=machine)
            ax.plot(shares, [r["dense_split"] for r in mine], colour, linestyle="--")
            ax.axhline(mine[0]["all_cpu"], color=colour, linestyle=":", linewidth=1)
        ax.set(title=f"{shape}, bf16", xlabel="VRAM budget, % of the model", yscale="log")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("tokens/s (modelled)")
    axes[0].legend(fontsize=8, title="solid: hybrid, dashed: dense by layers, dotted: CPU alone",
                   title_fontsize=8)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    rows = study()
    plot(rows, ROOT / "docs" / "placement.png")
    result = ROOT / "benchmarks" / "results" / "placement-study.json"
    result.write_text(json.dumps(rows, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
