"""Draws the decode speeds of a result of bench_peers.py: results/NAME.json -> results/NAME.png."""

import argparse
import json

import matplotlib as mpl
from results_file import RESULTS

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "transformers": "#b0b0b0",
    "llama.cpp": "#707070",
    "ours, dense original": "#bcd4e6",
    "ours, dense": "#7fb0d4",
    "ours, exact": "#2f7fb8",
    "ours, predicted": "#0b3c5d",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    path = RESULTS / f"{parser.parse_args().name}.json"
    result = json.loads(path.read_text())
    speeds = {
        (row["weights"], row["runner"]): row["tokens_per_s"]
        for row in result["results"]
        if row["what"] == "decode"
    }
    widths = list(dict.fromkeys(weights for weights, _ in speeds))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    bar = 0.8 / len(COLORS)
    for i, (runner, color) in enumerate(COLORS.items()):
        places = [n for n, weights in enumerate(widths) if (weights, runner) in speeds]
        heights = [speeds[widths[n], runner] for n in places]
        x = [n + (i - (len(COLORS) - 1) / 2) * bar for n in places]
        bars = axes.bar(x, heights, bar, color=color, label=runner)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlabel("weights")
    axes.set_ylabel("tokens/s, batch 1")
    cpus = result["hardware"]["logical_cpus"]
    axes.set_title(f"Decode, {result['hardware']['cpu']}, {cpus} logical CPUs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
