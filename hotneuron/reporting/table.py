"""The main table: which columns it has, how a value is written, and what would measure a gap.

Three panels of one table, since a page is not wide enough for all columns. Terminal and Markdown
write the same cells.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "-"
UNDEFINED = "undefined on these tokens: no neuron fired, or none was selected"
TRAIN = "measured by `train-predictors {model}`"
BENCH = "measured by `hotneuron report {model} --bench`"
QUALITY = "measured by `hotneuron report {model} --data FILE --dense ORIGINAL`"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def four_digits(value: float) -> str:
    return f"{value:.4f}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f}"


def rate(value: float) -> str:
    return f"{value:.1f}"


def times(value: float) -> str:
    return f"{value:.2f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Column:
    """One measure: its key in report.json, its heading, how it is written, what measures it."""

    key: str
    heading: str
    write: Callable[[Any], str]
    gap: str

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row[self.key]
        return ABSENT if value is None else self.write(value)


DATA = Column("data", "data", str, "")
PREDICTION = (
    DATA,
    Column("tokens", "tokens", count, ""),
    Column("natural_sparsity", "natural sparsity %", percent, UNDEFINED),
    Column("recall", "recall %", percent, UNDEFINED),
    Column("energy_recall", "energy recall %", percent, UNDEFINED),
    Column("predicted_sparsity", "predicted sparsity %", percent, UNDEFINED),
    Column("precision", "precision %", percent, UNDEFINED),
    Column("roc_auc", "ROC-AUC", four_digits, TRAIN),
    Column("predictor_kind", "kind", str, ""),
    Column("predictor_bytes", "MB", megabytes, ""),
)
SPEED = (
    Column("dense_tokens_per_s", "dense tokens/s", rate, BENCH),
    Column("exact_tokens_per_s", "exact tokens/s", rate, BENCH),
    Column("predicted_tokens_per_s", "predicted tokens/s", rate, BENCH),
    Column("exact_speedup", "exact / dense", times, BENCH),
    Column("predicted_speedup", "predicted / dense", times, BENCH),
)
QUALITIES = (
    DATA,
    Column("kl_to_exact", "KL to exact", four_digits, TRAIN),
    Column("agreement_with_exact", "top-1 as exact %", percent, TRAIN),
    Column("kl_to_original", "KL to original", four_digits, QUALITY),
    Column("agreement_with_original", "top-1 as original %", percent, QUALITY),
    Column("perplexity", "perplexity", times, QUALITY),
    Column("original_perplexity", "original's perplexity", times, QUALITY),
)
PANELS = {
    "Sparsity and prediction": PREDICTION,
    "Decode speed at batch 1": SPEED,
    "Predicted mode against exact mode, sparse model against its dense original": QUALITIES,
}
LAYER = (
    Column("layer", "layer", str, ""),
    *(column for column in PREDICTION[2:7]),
    Column("recall_ci95", "recall, 95 %", lambda pair: " to ".join(map(percent, pair)), UNDEFINED),
)


def rows_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each set of documents, with every column of the main table."""
    predictors = report["predictors"]
    return [
        {
            "model": report["model"]["name"],
            "data": one["name"],
            **{key: one["result"]["mean"][key] for key in _keys(PREDICTION[1:7])},
            "roc_auc": one["result"]["mean"].get("roc_auc"),
            "predictor_kind": predictors["kind"],
            "predictor_bytes": predictors["bytes"],
            **_speeds(report["speed"]),
            **_fidelity(one["result"].get("fidelity")),
            **_quality(report["quality"], one["name"]),
        }
        for one in report["sets"]
    ]


def _keys(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.key for column in columns)


def _speeds(speed: Mapping[str, Any] | None) -> dict[str, float | None]:
    if speed is None:
        return dict.fromkeys(_keys(SPEED))
    found = {row["mode"]: row["tokens_per_s"] for row in speed["results"]}
    return {
        **{f"{mode}_tokens_per_s": found[mode] for mode in ("dense", "exact", "predicted")},
        **{f"{mode}_speedup": found[mode] / found["dense"] for mode in ("exact", "predicted")},
    }


def _fidelity(fidelity: Mapping[str, Any] | None) -> dict[str, float | None]:
    found = fidelity or {"kl": None, "top1_agreement": None}
    return {"kl_to_exact": found["kl"], "agreement_with_exact": found["top1_agreement"]}


def _quality(quality: Mapping[str, Any] | None, name: str) -> dict[str, float | None]:
    keys = {
        "kl_to_original": "kl",
        "agreement_with_original": "top1_agreement",
        "perplexity": "perplexity",
        "original_perplexity": "teacher_perplexity",
    }
    if quality is None:
        return dict.fromkeys(keys)
    return {key: quality["sets"][name][source] for key, source in keys.items()}


def missing_columns(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, str]:
    """{key: what to do} for each column of the main table that some row lacks."""
    return {
        column.key: column.gap.format(model=model)
        for columns in PANELS.values()
        for column in columns
        if any(row[column.key] is None for row in rows)
    }


def panel_rows(
    columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """Speed does not depend on the documents, so its panel has one row."""
    return rows if DATA in columns else rows[:1]


def footnotes(columns: Sequence[Column], missing: Mapping[str, str]) -> list[str]:
    """One line for each reason why cells of these columns are "-"."""
    by_reason: dict[str, list[str]] = {}
    for column in columns:
        if column.key in missing:
            by_reason.setdefault(missing[column.key], []).append(column.heading)
    return [f'"{ABSENT}" in {", ".join(names)}: {why}.' for why, names in by_reason.items()]
