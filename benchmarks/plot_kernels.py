"""Draws a result of bench_kernels.py: results/NAME.json -> results/NAME.png.

Above the speed of the FFN's modes against dense by active share, below the bytes they read in a
second beside plain reading over as many bytes.
"""

import argparse
import json

import matplotlib as mpl
from results_file import RESULTS

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"dense": "#7fb0d4", "exact": "#2f7fb8", "predicted": "#0b3c5d"}
READ_COLOR = "#b0b0b0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    path = RESULTS / f"{parser.parse_args().name}.json"
    result = json.loads(path.read_text())
    widths = list(dict.fromkeys(row["weights"] for row in result["results"]))
    figure, axes = plt.subplots(
        2, len(widths), figsize=(3.6 * len(widths), 6), sharex=True, sharey="row", squeeze=False
    )
    for column, width in enumerate(widths):
        above, below = axes[:, column]
        rows = [row for row in result["results"] if row["weights"] == width and row["active"]]
        dense = {row["active"]: row["seconds"] for row in rows if row["op"] == "ffn dense"}
        for mode, color in COLORS.items():
            of_mode = [row for row in rows if row["op"] == f"ffn {mode}"]
            x = [row["active"] for row in of_mode]
            times = [dense[row["active"]] / row["seconds"] for row in of_mode]
            above.plot(x, times, "o-", color=color, label=mode)
            speeds = [row["bytes_per_second"] / 1e9 for row in of_mode]
            below.plot(x, speeds, "o-", color=color, label=mode)
            limits = [row["read_bytes_per_second"] / 1e9 for row in of_mode]
            label = "plain reading of as much" if mode == "dense" else None
            below.plot(x, limits, ":", color=READ_COLOR if mode == "dense" else color, label=label)
        above.set_title(width)
        above.set_yscale("log", base=2)
        above.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
        below.set_xlabel("active neurons, %")
        below.set_xscale("log")
        below.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
        for one in (above, below):
            one.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("times dense")
    axes[1, 0].set_ylabel("GB/s")
    axes[1, 0].set_ylim(0)
    axes[1, -1].legend(frameon=False, fontsize=8)
    settings = result["settings"]
    shape = f"D {settings['d_model']}, F {settings['num_neurons']}, {settings['tokens']} token"
    figure.suptitle(f"FFN, {shape}; dotted: plain reading of as many bytes", fontsize=10)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
