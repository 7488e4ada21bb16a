"""Stage 4: what the predictors are worth on documents that neither trained nor calibrated them.

Every figure comes out of predictor.RecallMeter, the baselines included. `evaluate` gives the same
figures for a model folder and chats of the caller's choice, through the runtime's own forward.
Dimension key: N tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from predictor import Predictor, RecallMeter, fingerprint, load_predictors
from training_predictors.baselines import blind_scores
from training_predictors.documents import BadData, DocumentKind, Piece, load_documents, pieces_of
from training_predictors.fidelity import measure_fidelity
from training_predictors.record import ForwardMode, TapModel, tapped_forward
from training_predictors.recording import LayerData

AUC_TOKENS = 384
CHUNK_TOKENS = 1024


def measure_layer(
    predictor: Predictor, data: LayerData, frequency_F: Tensor, seed: int
) -> dict[str, Any]:
    """One layer's report row: its figures, ROC-AUC, and baselines that skip just as much."""
    ours = RecallMeter(1)
    ones_F = torch.ones(predictor.num_neurons)  # recorded magnitudes include norm(down)
    for begin in range(0, data.num_tokens, CHUNK_TOKENS):
        rows = slice(begin, begin + CHUNK_TOKENS)
        ours.add(0, data.magnitude_NF[rows].float(), predictor.select(data.x_ND[rows]), ones_F)
    row: dict[str, Any] = ours.report()["layers"][0]
    _check_finite(row)
    num_kept = round((1 - row["predicted_sparsity"]) * predictor.num_neurons)
    return row | {
        "roc_auc": _roc_auc(predictor, data),
        "baselines": _baselines(data, num_kept, frequency_F, seed),
    }


def _roc_auc(predictor: Predictor, data: LayerData) -> float | None:
    step = max(1, data.num_tokens // AUC_TOKENS)
    active = data.active_NF[::step].flatten()
    if not active.any() or active.all():
        return None
    return float(
        roc_auc_score(active.numpy(), predictor.score(data.x_ND[::step]).flatten().numpy())
    )


def _baselines(
    data: LayerData, num_kept: int, frequency_F: Tensor, seed: int
) -> dict[str, dict[str, float | None]]:
    """Recall of masks that keep `num_kept` neurons without looking at the input."""
    ones_F = torch.ones(len(frequency_F))
    found = {}
    for name, score_NF in blind_scores(data, frequency_F, seed).items():
        meter = RecallMeter(1)
        meter.add(0, data.magnitude_NF.float(), _top_mask(score_NF, num_kept), ones_F)
        row = meter.report()["layers"][0]
        found[name] = {"recall": row["recall"], "energy_recall": row["energy_recall"]}
    return found


def _top_mask(value_NF: Tensor, num_kept: int) -> Tensor:
    mask_NF = torch.zeros(value_NF.shape, dtype=torch.bool)
    return mask_NF.scatter_(1, value_NF.topk(num_kept, dim=1).indices, True)


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over layers of the report rows' figures; ranks, bytes and seconds are summed."""
    mean: dict[str, Any] = {}
    for key in (
        "natural_sparsity",
        "predicted_sparsity",
        "recall",
        "energy_recall",
        "precision",
        "roc_auc",
    ):
        values = [row[key] for row in rows if row[key] is not None]
        mean[key] = sum(values) / len(values) if values else None
    mean["baselines"] = {
        name: {
            key: sum(row["baselines"][name][key] or 0.0 for row in rows) / len(rows)
            for key in ("recall", "energy_recall")
        }
        for name in rows[0]["baselines"]
    }
    mean |= {"bytes": sum(row["bytes"] for row in rows)}
    mean |= {"seconds": sum(row["seconds"] for row in rows)}
    mean["tokens"] = max(row["tokens"] for row in rows)
    return mean


def print_table(report: dict[str, Any], console: Console) -> None:
    """The per-layer table with the means of both kinds of text, the answers' fidelity, and what
    input-blind masks of the same size would reach.
    """
    headings = {
        "natural_sparsity": "natural",
        "predicted_sparsity": "predicted",
        "recall": "recall",
        "energy_recall": "energy\nrecall",
        "precision": "precision",
        "roc_auc": "AUC",
    }
    keys = tuple(headings)
    table = Table(
        title="predictors on held-out documents (shares in %)",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    for heading in ("layer", *headings.values(), "rank", "KB", "s"):
        table.add_column(heading, justify="right")
    for row in report["layers"]:
        table.add_row(
            str(row["layer"]),
            *[_percent(row[key]) for key in keys],
            str(row.get("rank", "-")),
            f"{row['bytes'] / 1000:.0f}",
            f"{row['seconds']:.0f}",
        )
    mean = report["mean"]
    table.add_section()
    table.add_row(
        "mean",
        *[_percent(mean[key]) for key in keys],
        "",
        f"{mean['bytes'] / 1000:.0f}",
        f"{mean['seconds']:.0f}",
    )
    if other := report.get("other"):
        table.add_row("other", *[_percent(other["mean"][key]) for key in keys], "", "", "")
    console.print(table)
    for title, fidelity in (
        ("held-out documents", report.get("fidelity")),
        ("texts of another kind", other and other["fidelity"]),
    ):
        if fidelity:
            console.print(
                f"{title}: KL of predicted to exact mode {fidelity['kl']:.4f} nats, "
                f"same greedy token {_percent(fidelity['top1_agreement'])} % "
                f"({fidelity['tokens']} tokens)",
                highlight=False,
                soft_wrap=True,
            )
    for name, figures in mean["baselines"].items():
        console.print(
            f"{name.replace('_', ' ')} mask at the same predicted sparsity: "
            f"recall {_percent(figures['recall'])} %, "
            f"energy recall {_percent(figures['energy_recall'])} %",
            highlight=False,
            soft_wrap=True,
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def evaluate(
    model_dir: Path,
    data: Sequence[Path],
    *,
    sparsity_dir: Path | None = None,
    only: DocumentKind | None = None,
    max_tokens: int | None = None,
    context: int = 1024,
    seed: int = 0,
    mode: ForwardMode = "predicted",
    model: TapModel | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Score the stored predictors on the assistant tokens of chats (or on texts), or `only` one.

    In mode predicted each layer sees what serving gives it, after the misses of the layers before;
    in mode dense, what it was trained on. Returns {"layers": [...], "mean": {...}} as
    RecallMeter.report gives them, with the number of documents, the mode, the fingerprint and, in
    mode predicted, the "fidelity" to exact mode that measure_fidelity gives for the first tokens.
    `model` and `tokenizer` not given are loaded from `model_dir`.
    """
    model_dir = Path(model_dir)
    name = fingerprint(model_dir)
    predictors = load_predictors(sparsity_dir or model_dir / "sparsity", fingerprint=name)
    if model is None or tokenizer is None:
        from training_predictors.pipeline import load_model, load_tokenizer

        model = model or load_model(model_dir, predictors)
        tokenizer = tokenizer or load_tokenizer(model_dir)
    meter = RecallMeter(len(predictors))
    down_norm_LF = model.down_norm_LF.float().cpu()

    def score(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
        selected_NF = predictors[layer].select(x_ND.cpu())
        meter.add(layer, h_NF.cpu(), selected_NF, down_norm_LF[layer])

    num_documents = 0
    pieces: list[Piece] = []
    for document in load_documents(data, seed):
        if only not in (None, document.kind):
            continue
        if max_tokens is not None and meter.tokens(0) >= max_tokens:
            break
        num_documents += 1
        for piece in pieces_of(document, tokenizer, context):
            tapped_forward(model, piece, score, mode)
            pieces.append(piece)
    measured = meter.report()
    _check_finite(measured["mean"])
    if meter.tokens(0) == 0:
        raise BadData("the data holds no assistant token to score.")
    facts: dict[str, Any] = {"documents": num_documents, "mode": mode, "fingerprint": name}
    if mode == "predicted":
        facts["fidelity"] = measure_fidelity(model, pieces)
    return facts | measured


def _check_finite(row: Mapping[str, Any]) -> None:
    """A server goes on beside such a token; figures that predictors are judged by must not."""
    if row["nonfinite_tokens"]:
        raise BadData(
            f"the model's activations are not finite for {row['nonfinite_tokens']} tokens; check "
            "its weights, or compute it in float32."
        )
