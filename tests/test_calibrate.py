"""Thresholds: one definition with the meter, chosen together; the answers' fidelity."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from predictor import RecallMeter
from training_predictors.calibrate import (
    AnswerCost,
    Choices,
    Curve,
    Targets,
    choose_thresholds,
)
from training_predictors.fidelity import FidelityMeter

F, N = 40, 800


def layer_of(seed: int, noise: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """score_NF and magnitude_NF; more noise makes a layer whose neurons are harder to tell."""
    rng = torch.Generator().manual_seed(seed)
    gate_NF = torch.randn(N, F, generator=rng) + shift
    magnitude_NF = torch.relu(gate_NF).half()
    magnitude_NF[7] = 0  # a token without active neurons
    return gate_NF + noise * torch.randn(N, F, generator=rng), magnitude_NF


def measured(score_NF: Tensor, magnitude_NF: Tensor, threshold: float) -> dict[str, float]:
    meter = RecallMeter(1)
    meter.add(0, magnitude_NF.float(), score_NF > threshold, torch.ones(F))
    mean: dict[str, float] = meter.report()["mean"]
    return mean


def most_skipped(curve: Curve, targets: Targets) -> float:
    """What a layer could skip if it had to reach both targets alone."""
    enough = (curve.recall >= targets.recall) & (curve.energy_recall >= targets.energy_recall)
    return float((curve.all_score < curve.active_score[int(np.argmax(enough))]).mean())


def test_curve_and_meter_are_one_definition() -> None:
    score_NF, magnitude_NF = layer_of(3, noise=1.0)
    curve = Curve.of(score_NF, magnitude_NF)
    for targets in (Targets(0.9, 0.5), Targets(0.5, 0.99), Targets(0.999, 0.999)):
        (threshold,) = choose_thresholds([curve.choices(targets)], targets)
        figures = measured(score_NF, magnitude_NF, threshold)
        assert figures["recall"] >= targets.recall - 1e-9
        assert figures["energy_recall"] >= targets.energy_recall - 1e-9
        (point,) = curve.at([threshold])
        for key in ("recall", "energy_recall", "predicted_sparsity"):
            assert point[key] == pytest.approx(figures[key], abs=2e-5), key
        # with one layer there is nothing to balance: it skips all that it may
        most = most_skipped(curve, targets)
        assert figures["predicted_sparsity"] == pytest.approx(most, abs=0.002)


def test_neurons_with_equal_scores_are_kept_together() -> None:
    magnitude_NF = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    curve = Curve.of(torch.tensor([[5.0, 5.0, 5.0, 1.0]]), magnitude_NF)
    choices = curve.choices(Targets(0.9, 0.9))
    assert choices.recall_P == pytest.approx(1.0)
    assert choices.skipped_P == pytest.approx(0.25)
    assert ((choices.threshold_P < 5) & (choices.threshold_P >= 1)).all()


@pytest.mark.parametrize("targets", [Targets(0.5, 0.99), Targets(0.97, 0.9), Targets(0.96, 0.99)])
def test_layers_together_skip_more_than_each_alone(targets: Targets) -> None:
    kinds = ((0.1, -1.0), (0.5, 0.0), (1.5, 0.5))
    layers = [layer_of(seed, *kind) for seed, kind in enumerate(kinds)]
    curves = [Curve.of(*layer) for layer in layers]
    thresholds = choose_thresholds([curve.choices(targets) for curve in curves], targets)
    figures = [measured(*layer, t) for layer, t in zip(layers, thresholds, strict=True)]
    mean = {key: np.mean([row[key] for row in figures]) for key in ("recall", "energy_recall")}
    assert mean["recall"] >= targets.recall - 1e-9
    assert mean["energy_recall"] >= targets.energy_recall - 1e-9
    together = np.mean([row["predicted_sparsity"] for row in figures])
    assert together > np.mean([most_skipped(curve, targets) for curve in curves]) + 0.005
    for row in figures:
        assert 1 - row["recall"] <= 3 * (1 - targets.recall) + 1e-9
        assert 1 - row["energy_recall"] <= 3 * (1 - targets.energy_recall) + 1e-9


def test_choice_is_the_best_of_all_on_concave_curves() -> None:
    """Against trying every combination; each curve loses more for each further neuron skipped."""
    skipped_P = np.linspace(0.9, 0.0, 12)
    losses = [(0.10, 0.04), (0.02, 0.05), (0.30, 0.01)]
    layers = [
        Choices(-skipped_P, skipped_P, 1 - a * skipped_P**2, 1 - b * skipped_P**2)
        for a, b in losses
    ]
    for targets in (Targets(0.9, 0.985), Targets(0.95, 0.9), Targets(0.94, 0.98)):
        best = max(
            float(np.mean([skipped_P[i] for i in picks]))
            for picks in product(range(len(skipped_P)), repeat=3)
            if np.mean([c.recall_P[i] for c, i in zip(layers, picks, strict=True)])
            >= targets.recall
            and np.mean([c.energy_recall_P[i] for c, i in zip(layers, picks, strict=True)])
            >= targets.energy_recall
        )
        chosen = -np.mean(choose_thresholds(layers, targets))
        assert best - 0.03 <= chosen <= best + 1e-9  # one step of one layer is 0.027


def test_dear_layers_miss_less_where_answers_are_bounded() -> None:
    """Against trying every combination: the bound holds, and little more could be skipped."""
    skipped_P = np.linspace(0.9, 0.0, 12)
    layers = [
        Choices(-skipped_P, skipped_P, 1 - 0.1 * skipped_P**2, 1 - 0.04 * skipped_P**2)
        for _ in range(3)
    ]
    targets = Targets(0.5, 0.5)
    free = choose_thresholds(layers, targets)
    assert free == [-0.9] * 3
    cost = AnswerCost(np.array([3.0, 8.0, 0.0]), bound=0.06)
    chosen = [-threshold for threshold in choose_thresholds(layers, targets, cost)]
    assert chosen[1] < chosen[0] < chosen[2] == 0.9
    assert cost.of([1 - 0.04 * share**2 for share in chosen]) <= cost.bound + 1e-12
    best = max(
        float(np.mean([skipped_P[i] for i in picks]))
        for picks in product(range(len(skipped_P)), repeat=3)
        if cost.of([layers[0].energy_recall_P[i] for i in picks]) <= cost.bound
    )
    assert best - 0.03 <= np.mean(chosen) <= best + 1e-9


def test_fidelity_is_the_mean_divergence() -> None:
    rng = torch.Generator().manual_seed(1)
    exact_NV, predicted_NV = torch.randn(2, 600, 9, generator=rng)
    meter = FidelityMeter()
    meter.add(exact_NV[:500], predicted_NV[:500])
    meter.add(exact_NV[500:], predicted_NV[500:])
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (exact_NV, predicted_NV))
    expected = float(torch.distributions.kl_divergence(p, q).mean())
    report = meter.report()
    assert report["tokens"] == 600
    assert report["kl"] == pytest.approx(expected, rel=1e-5)
    same = (exact_NV.argmax(1) == predicted_NV.argmax(1)).float().mean()
    assert report["top1_agreement"] == pytest.approx(float(same))
    assert FidelityMeter().report()["kl"] is None
