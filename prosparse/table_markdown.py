"""The comparison of recipes as Markdown: scores and sparsity, quality by set, the curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def show_threshold(row: dict[str, Any]) -> str:
    if row["activation"] == "silu":
        return "-"
    if isinstance(row["threshold"], list | tuple):
        return "by layer"
    kind = "shift " if row["activation"] == "shifted_relu" else ""
    return f"{kind}{row['threshold']:g}"


def sparsity(row: dict[str, Any], name: str) -> str:
    return "-" if row["activation"] == "silu" else f"{row['sets'][name]['sparsity']:.2%}"


def markdown(
    method: dict[str, Any], rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]
) -> str:
    """The tables, and what the curves say."""
    sets = method["sets"]
    first = next(iter(sets))
    names = method["tasks"]["names"]
    main = [
        [
            row["name"],
            row["language_loss"] or "-",
            "-" if row["tokens"] is None else f"{row['tokens']:,}",
            show_threshold(row),
            *(f"{row['tasks'][name]['accuracy']:.1%}" for name in names),
            f"{row['task_mean']['accuracy']:.1%} ± {row['task_mean']['stderr']:.1%}",
            sparsity(row, first),
        ]
        for row in rows
    ]
    chance = method["tasks"]["chance"]
    guesses = [f"{chance[name]:.0%}" for name in names]
    main.append(
        ["chance", "-", "-", "-", *guesses, f"{sum(chance.values()) / len(chance):.1%}", "-"]
    )
    header = [
        "recipe",
        "language loss",
        "tokens",
        "threshold",
        *names,
        "mean",
        f"sparsity, {first}",
    ]
    lines = [
        "# Recipes compared",
        "",
        "The first row is the dense model. `*`: before the threshold shift, which may cost "
        f"{method['max_kl_increase']:g} nats per token on validation documents. Scores are shares "
        "of right answers; ± is the standard error of the mean over tasks.",
        "",
        *table_lines(header, main),
    ]
    for name in sets:
        skipped = sets[name]["skip"]
        lines += ["", f"Held-out {name}: {sets[name]['documents']} documents"]
        lines[-1] += f", after the {skipped} tokens that all share." if skipped > 1 else "."
        body = [
            [
                row["name"],
                sparsity(row, name),
                f"{row['sets'][name]['kl']:.4f}",
                f"{row['sets'][name]['top1_agreement']:.2%}",
                f"{row['sets'][name]['perplexity']:.3f}",
                f"{row['sets'][name]['teacher_perplexity']:.3f}",
            ]
            for row in rows
        ]
        columns = ["recipe", "sparsity", "KL", "top-1", "perplexity", "dense perplexity"]
        lines += ["", *table_lines(columns, body)]
    if curves:
        lines += ["", "## Quality against tokens", "", "![](curves.png)", ""]
        lines += [curve_line(curve) for curve in curves]
    return "\n".join(lines) + "\n"


def curve_line(curve: dict[str, Any]) -> str:
    law = curve["law"]
    if law is None:
        return f"- {curve['name']}: too few points after warm-up for a fit"
    text = (
        f"- {curve['name']}: KL = {law['scale']:.3g} * tokens^-{law['exponent']:.3f} "
        f"(exponent ± {law['exponent_stderr']:.3f}, R² {law['r2']:.3f}, {law['points']} points); "
    )
    wanted = curve["tokens_for_target"]
    target = f"KL {curve['target_kl']:g}"
    if wanted is None:
        return text + f"by this law {target} is out of reach"
    if curve["extrapolated"]:
        return text + (
            f"{target} at {wanted:,.0f} tokens: an EXTRAPOLATION, "
            f"{wanted / curve['last_tokens']:.1f} times what was trained"
        )
    return text + f"{target} at {wanted:,.0f} tokens"
