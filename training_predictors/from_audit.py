"""`train-predictors MODEL --from-audit FOLDER`: improve the stored predictors on real traffic.

Starts from the stored weights, trains on the kept samples of most requests, and calibrates on
samples of others. A layer takes what does better on samples of a third set of requests: its old
predictor, the old weights with a new threshold, or the new weights. Better is what falls less short
of the targets, then what skips more; a tie keeps the older. If no layer has anything better, the
stored predictors stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from predictor import MlpPredictor, PredictorSet, fingerprint, load_predictors, save_predictors
from predictor.files import write_json
from predictor.profile import PROFILE_FILE
from runtime.config import ModelConfig
from training_predictors.calibrate import Curve, Targets, choose_thresholds, scores_of
from training_predictors.documents import BadData
from training_predictors.kept_audit import open_samples
from training_predictors.progress import progress_bar
from training_predictors.recording import LayerData, Recording
from training_predictors.report import mean_of, measure_layer
from training_predictors.train import TrainSettings, train_layer

LEARNING_RATE = 0.02  # the start is already good; the step from scratch would forget it
MIN_TOKENS = 200  # of each split; fewer would choose by chance
# Differences in recall, and in predicted sparsity, that held-out samples cannot tell from none.
RECALL_NOISE = 0.003
SPLITS = ("train", "calibrate", "test")
TARGETS = ("recall", "energy_recall")
SPARSITY_NOISE = 0.002
CANDIDATES = ("stored", "stored, new threshold", "trained on the audit's samples")


@dataclass(frozen=True)
class AuditPlan:
    """Everything the user decides."""

    model_dir: Path
    samples: Path
    out: Path
    targets: dict[str, float] = field(default_factory=dict)  # not named: the stored ones'
    train: TrainSettings = field(default_factory=lambda: TrainSettings(learning_rate=LEARNING_RATE))
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Choice:
    """A layer's new predictor, which candidate it is, and what each candidate did on held-out."""

    predictor: MlpPredictor
    taken: int  # index into CANDIDATES
    points: list[dict[str, float]]
    curve: Curve
    facts: dict[str, Any]


def improve(plan: AuditPlan, console: Console) -> dict[str, Any] | None:
    """Write the better predictors to plan.out and return their report; None if none is better."""
    stored_dir = plan.model_dir / "sparsity"
    name = fingerprint(plan.model_dir)
    stored = load_predictors(stored_dir, fingerprint=name)
    targets_L = _targets(plan, stored)
    config = ModelConfig.from_folder(plan.model_dir)
    samples = open_samples(plan.samples, name, config.num_neurons)
    tokens = _check(samples, plan.samples)
    choices: list[Choice] = []
    rows: list[dict[str, Any]] = []
    with progress_bar(console, "improve", len(stored)) as advance:
        for layer, predictor in enumerate(stored):
            if not isinstance(predictor, MlpPredictor):
                raise BadData(
                    f"layer {layer}: only predictors of the kind `mlp` can be trained further; "
                    "train anew without --from-audit."
                )
            data = {split: samples.layer(layer, split) for split in SPLITS}
            predictor = replace(predictor, kind="mlp")  # `svd`, trained further, is one
            choice = choose(predictor, data, targets_L[layer], plan)
            choices.append(choice)
            frequency_F = data["train"].active_NF.float().mean(0)
            rows.append(
                measure_layer(choice.predictor, data["test"], frequency_F, plan.seed)
                | {"layer": layer, "bytes": predictor.num_bytes}
                | {"predictor": CANDIDATES[choice.taken], "candidates": choice.points}
                | {"calibrated": asdict(targets_L[layer])}
                | choice.facts
            )
            advance(1)
    _say(choices, console)
    if all(choice.taken == 0 for choice in choices):
        return None
    made = {
        "by": "train-predictors --from-audit",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "seed": plan.seed,
        "texts": "samples that the audit kept while serving",
        "held_out": "a fifth of the requests",
        "tokens": tokens,
        "targets": _aims(plan, stored),
        "train": asdict(plan.train),
        "taken": {what: _count(choices, index) for index, what in enumerate(CANDIDATES)},
        "from": stored.manifest.get("made"),
    }
    report = {"made": made, "fingerprint": name, "layers": rows, "mean": mean_of(rows)}
    _write(plan, stored_dir, choices, report)
    return report


def choose(
    predictor: MlpPredictor, data: dict[str, LayerData], targets: Targets, plan: AuditPlan
) -> Choice:
    """The best candidate of one layer."""
    start = [predictor.fc1_RD, predictor.bias_R, predictor.fc2_FR, predictor.bias_F]
    trained = train_layer(
        data["train"], data["calibrate"], predictor.rank, plan.train, plan.device, start=start
    )
    old_curve, new_curve = (
        Curve.of(scores_of(p.score(data["calibrate"].x_ND)), data["calibrate"].magnitude_NF)
        for p in (predictor, trained.predictor)
    )
    candidates = [
        predictor,
        predictor.with_threshold(threshold_for(old_curve, targets)),
        trained.predictor.with_threshold(threshold_for(new_curve, targets)),
    ]
    points = [_measure(candidate, data["test"]) for candidate in candidates]
    taken = 0
    for index in (1, 2):
        if is_better(points[index], points[taken], targets):
            taken = index
    curve = new_curve if taken == 2 else old_curve
    return Choice(candidates[taken], taken, points, curve, trained.facts)


def is_better(new: dict[str, float], old: dict[str, float], targets: Targets) -> bool:
    """Nearer to the targets, or as near and skipping more, by more than noise."""

    def shortfall(point: dict[str, float]) -> float:
        return max(
            0.0,
            targets.recall - point["recall"],
            targets.energy_recall - point["energy_recall"],
        )

    gain = shortfall(old) - shortfall(new)
    if abs(gain) > RECALL_NOISE:
        return gain > 0
    return new["predicted_sparsity"] - old["predicted_sparsity"] > SPARSITY_NOISE


def _measure(predictor: MlpPredictor, data: LayerData) -> dict[str, float]:
    curve = Curve.of(scores_of(predictor.score(data.x_ND)), data.magnitude_NF)
    return curve.at([predictor.threshold])[0]


def threshold_for(curve: Curve, targets: Targets) -> float:
    """The highest threshold at which this layer alone reaches both."""
    (threshold,) = choose_thresholds([curve.choices(targets)], targets)
    return threshold


def _aims(plan: AuditPlan, stored: PredictorSet) -> dict[str, float]:
    """What was asked for, else what the stored predictors were calibrated to, if that is known."""
    made = stored.manifest.get("made", {}).get("targets", {})
    known = {name: made[name] for name in TARGETS if name in made}
    return asdict(Targets(**known | plan.targets))


def _targets(plan: AuditPlan, stored: PredictorSet) -> list[Targets]:
    """Each layer's: what it reached when all were calibrated together, more in some and less in
    others. What was asked for, or without a report what all aimed at, is every layer's own."""
    path = plan.model_dir / "sparsity" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = report.get("layers") or [{}] * len(stored)
    return [
        Targets(**_aims(plan, stored) | row.get("calibrated", {}) | plan.targets) for row in rows
    ]


def _check(samples: Recording, folder: Path) -> dict[str, int]:
    counted = samples.tokens_by_split()
    tokens = {split: counted[split] for split in SPLITS}
    if too_few := [split for split, count in tokens.items() if count < MIN_TOKENS]:
        raise BadData(
            f"`{folder}` has too few samples: {tokens[too_few[0]]} tokens to {too_few[0]} the "
            f"predictors, {MIN_TOKENS} are the least (of ten requests one calibrates and one "
            "tests). Serve longer with `hotneuron serve --keep-audit`, or raise --audit-rate."
        )
    return tokens


def _count(choices: Sequence[Choice], taken: int) -> int:
    return sum(choice.taken == taken for choice in choices)


def _say(choices: Sequence[Choice], console: Console) -> None:
    for index, what in enumerate(CANDIDATES):
        figures = {
            key: sum(choice.points[index][key] for choice in choices) / len(choices)
            for key in ("recall", "energy_recall", "predicted_sparsity")
        }
        console.print(
            f"{what}: recall {figures['recall']:.1%}, energy recall "
            f"{figures['energy_recall']:.1%}, predicted sparsity "
            f"{figures['predicted_sparsity']:.1%} on held-out samples; "
            f"taken for {_count(choices, index)} of {len(choices)} layers",
            highlight=False,
            soft_wrap=True,
        )


def _write(
    plan: AuditPlan, stored_dir: Path, choices: Sequence[Choice], report: dict[str, Any]
) -> None:
    """The sparsity folder, manifest last; the activation profile stays the stored one's."""
    profile = stored_dir / PROFILE_FILE
    if profile.is_file() and plan.out.resolve() != stored_dir.resolve():
        plan.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(profile, plan.out / PROFILE_FILE)
    curves = [{"layer": i, **choice.curve.columns()} for i, choice in enumerate(choices)]
    name, made = report["fingerprint"], report["made"]
    write_json(plan.out / "curves.json", {"fingerprint": name, "layers": curves}, indent=None)
    write_json(plan.out / "report.json", report)
    (plan.out / "kinds.json").unlink(missing_ok=True)  # compared the predictors of before
    layers = [choice.predictor for choice in choices]
    save_predictors(plan.out, PredictorSet(layers, {"fingerprint": name, "made": made}))
