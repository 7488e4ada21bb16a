"""What a trained predictor has to beat: masks that do not look at the input, and PowerInfer's own.

PowerInfer's recipe is that of the ProSparse authors' published trainer: two matrices without
biases, random start, the residual stream before the FFN's norm as input, and binary cross-entropy
in which a silent neuron weighs as much as the batch has active ones. They serve it at logit 0.
Dimension key: N tokens, D model width, R rank, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training_predictors.recording import LayerData

PREVIOUS_DECAY = 0.5
POWERINFER_WIDTH_SHARE = 0.25  # their rank is 1024 for a model of width 4096
POWERINFER_EPOCHS = 20
POWERINFER_PATIENCE = 5  # epochs without a better recall
POWERINFER_ENOUGH_RECALL = 0.99
POWERINFER_BATCH_TOKENS = 1024
POWERINFER_LEARNING_RATE = 1e-3
POWERINFER_WEIGHT_DECAY = 0.01
POWERINFER_NEGATIVE_WEIGHT = 0.005  # of a silent neuron, over the batch's share of active ones


def blind_scores(data: LayerData, frequency_F: Tensor, seed: int) -> dict[str, Tensor]:
    """score_NF of masks that know no input: how often a neuron fires, how recently, nothing."""
    active_NF = data.active_NF.float()
    recent_NF = torch.empty_like(active_NF)
    recent_F = torch.zeros_like(frequency_F)
    for index, active_F in enumerate(active_NF):
        recent_NF[index] = recent_F
        recent_F = PREVIOUS_DECAY * recent_F + active_F
    generator = torch.Generator().manual_seed(seed)
    return {
        "frequency": frequency_F.expand(active_NF.shape),
        # of equally recent neurons the more frequent one
        "previous_tokens": recent_NF + 1e-3 * frequency_F,
        "random": torch.rand(active_NF.shape, generator=generator),
    }


@dataclass(frozen=True)
class PowerInferPredictor:
    """Their network with fp16 matrices, as their files hold it; a Scorer."""

    fc1_RD: Tensor
    fc2_FR: Tensor

    @property
    def num_bytes(self) -> int:
        return 2 * (self.fc1_RD.numel() + self.fc2_FR.numel())

    def score(self, x_ND: Tensor) -> Tensor:
        """score_NF from the residual stream before the FFN's norm."""
        fc1_RD, fc2_FR = (weight.half().float() for weight in (self.fc1_RD, self.fc2_FR))
        return torch.relu(x_ND.float() @ fc1_RD.T) @ fc2_FR.T


def train_powerinfer(
    train: LayerData, held_out: LayerData, rank: int, seed: int
) -> PowerInferPredictor:
    """Their recipe; x_ND of both parts is the residual stream. The epoch of most recall wins."""
    generator = torch.Generator().manual_seed(seed)
    x_ND, active_NF = train.x_ND.float(), train.active_NF

    def matrix(rows: int, columns: int) -> Tensor:
        bound = columns**-0.5  # torch's own start of a Linear
        start = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return start.requires_grad_()

    fc1_RD, fc2_FR = matrix(rank, x_ND.shape[1]), matrix(active_NF.shape[1], rank)
    optimizer = torch.optim.AdamW(
        [fc1_RD, fc2_FR], lr=POWERINFER_LEARNING_RATE, weight_decay=POWERINFER_WEIGHT_DECAY
    )

    def snapshot() -> PowerInferPredictor:
        return PowerInferPredictor(fc1_RD.detach().clone(), fc2_FR.detach().clone())

    best, best_recall, best_epoch = snapshot(), -1.0, 0
    for epoch in range(POWERINFER_EPOCHS):
        order_N = torch.randperm(len(x_ND), generator=generator)
        for rows in torch.split(order_N, POWERINFER_BATCH_TOKENS):
            label_NF = active_NF[rows].float()
            score_NF = torch.relu(x_ND[rows] @ fc1_RD.T) @ fc2_FR.T
            silent_weight = label_NF.mean() + POWERINFER_NEGATIVE_WEIGHT
            loss = functional.binary_cross_entropy_with_logits(
                score_NF, label_NF, weight=torch.where(label_NF > 0, 1.0, silent_weight)
            )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        candidate = snapshot()
        recall = _recall(candidate, held_out)
        if recall > best_recall:
            best, best_recall, best_epoch = candidate, recall, epoch
        if recall > POWERINFER_ENOUGH_RECALL or epoch - best_epoch >= POWERINFER_PATIENCE:
            break
    return best


def _recall(predictor: PowerInferPredictor, data: LayerData) -> float:
    """Share of all active neurons with a positive logit, pooled over tokens as they do."""
    active_NF = data.active_NF
    hit_NF = active_NF & (predictor.score(data.x_ND) > 0)
    return float(hit_NF.sum()) / max(1, int(active_NF.sum()))
