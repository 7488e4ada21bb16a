"""Per-neuron thresholds: what to add to each neuron's scores, from documents kept out of training.

One threshold per layer suits a neuron only if its scores mean the same as its neighbours'. On
unseen texts they do not quite: training has seen some neurons fire too often or too seldom. So
every neuron's bias is fitted once more to the held-out tokens, by the loss of training, with a pull
towards the old one that leaves rare neurons where they are. The offset goes into the predictor's
bias: neither its file nor the kernels know of it.
Dimension key: N tokens, F neurons.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from predictor import MlpPredictor
from training_predictors.calibrate import Curve, Targets, scores_of
from training_predictors.recording import LayerData
from training_predictors.train import TrainSettings, cost_weights

NEWTON_STEPS = 8
LARGEST_STEP = 1.0  # of a score, so that a neuron that never fires moves slowly
PULL = 25.0  # in units of the loss's curvature: a certain token's is at most a quarter of its cost


def fit_offsets(score_NF: Tensor, magnitude_NF: Tensor, settings: TrainSettings) -> Tensor:
    """offset_F that makes the loss of `score_NF + offset_F` least, plus PULL / 2 * offset^2."""
    cost_NF = cost_weights(magnitude_NF.float(), settings)
    active_NF = (magnitude_NF > 0).float()
    offset_F = torch.zeros(score_NF.shape[1])
    for _ in range(NEWTON_STEPS):
        chance_NF = torch.sigmoid(score_NF + offset_F)
        slope_F = (cost_NF * (chance_NF - active_NF)).sum(0) + PULL * offset_F
        curvature_F = (cost_NF * chance_NF * (1 - chance_NF)).sum(0) + PULL
        offset_F -= (slope_F / curvature_F).clamp(-LARGEST_STEP, LARGEST_STEP)
    return offset_F


def with_offsets(
    predictor: MlpPredictor, data: LayerData, targets: Targets, settings: TrainSettings
) -> tuple[MlpPredictor, Curve, bool]:
    """The predictor with its neurons' offsets if they pay, its curve to choose from, and whether.

    They are judged, and the curve is drawn, with each half of the tokens scored by the offsets of
    the other half: on the tokens that made them any offsets look good.
    """
    score_NF = scores_of(predictor.score(data.x_ND))
    plain = Curve.of(score_NF, data.magnitude_NF)
    middle = data.num_tokens // 2
    halves = slice(0, middle), slice(middle, None)
    first_F, second_F = (
        fit_offsets(score_NF[half], data.magnitude_NF[half], settings) for half in halves
    )
    crossed_NF = torch.cat([score_NF[halves[0]] + second_F, score_NF[halves[1]] + first_F])
    crossed = Curve.of(crossed_NF, data.magnitude_NF)
    if crossed.most_skipped(targets) <= plain.most_skipped(targets):
        return predictor, plain, False
    offset_F = fit_offsets(score_NF, data.magnitude_NF, settings)
    return replace(predictor, bias_F=predictor.bias_F + offset_F), crossed, True
