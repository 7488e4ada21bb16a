"""Thresholds: one definition with the meter, chosen together, and offsets that must pay."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from predictor import MlpPredictor, RecallMeter
from training_predictors.calibrate import Choices, Curve, Targets, choose_thresholds
from training_predictors.fidelity import FidelityMeter
from training_predictors.offsets import fit_offsets, with_offsets
from training_predictors.recording import LayerData
from training_predictors.train import TrainSettings

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
        most = curve.most_skipped(targets)
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
    assert together > np.mean([curve.most_skipped(targets) for curve in curves]) + 0.005
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


def test_offsets_are_kept_only_where_they_pay() -> None:
    rng = torch.Generator().manual_seed(0)
    D, tokens = 8, 4000
    gate_FD = torch.randn(F, D, generator=rng)
    x_ND = torch.randn(2 * tokens, D, generator=rng)
    gate_NF = x_ND @ gate_FD.T - 2.0
    magnitude_NF = torch.relu(gate_NF + torch.randn(gate_NF.shape, generator=rng)).half()
    data, fresh = (
        LayerData(x_ND[rows], torch.ones(tokens), magnitude_NF[rows])
        for rows in (slice(0, tokens), slice(tokens, None))
    )
    eye_2DD = torch.cat((torch.eye(D), -torch.eye(D)))
    fc2_F2D = 2 * torch.cat((gate_FD, -gate_FD), 1)
    wrong_F = torch.randn(F, generator=rng)
    targets, settings = Targets(0.9, 0.95), TrainSettings()

    def predictor(bias_F: Tensor) -> MlpPredictor:
        return MlpPredictor.from_float(eye_2DD, torch.zeros(2 * D), fc2_F2D, bias_F)

    def skipped(p: MlpPredictor) -> float:
        return Curve.of(p.score(fresh.x_ND), fresh.magnitude_NF).most_skipped(targets)

    shifted = predictor(2 * wrong_F)
    better, curve, pays = with_offsets(shifted, data, targets, settings)
    assert pays
    assert skipped(better) > skipped(shifted) + 0.02
    # the curve it is calibrated by promises no more than unseen tokens give
    assert curve.most_skipped(targets) == pytest.approx(skipped(better), abs=0.01)
    same, _, again = with_offsets(better, data, targets, settings)
    assert skipped(same) > skipped(better) - 0.005
    assert again or same is better


def test_a_neuron_seldom_seen_keeps_its_bias() -> None:
    score_NF = torch.full((3, 2), -2.0)
    magnitude_NF = torch.tensor([[1.0, 0.0]]).expand(3, 2).half()
    few_F = fit_offsets(score_NF, magnitude_NF, TrainSettings())
    many_F = fit_offsets(score_NF.repeat(400, 1), magnitude_NF.repeat(400, 1), TrainSettings())
    assert 0 < few_F[0] < 1 < 3 < many_F[0]
    assert -0.05 < few_F[1] < 0
    assert many_F[1] < -0.5


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
