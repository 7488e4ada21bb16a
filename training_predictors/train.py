"""Stage 2: one small MLP per layer, trained on recorded inputs, kept layer by layer.

The network starts as the best rank-R linear guess of the activity: hidden units are shifted up by
a few standard deviations, so the ReLU is open and all R of them carry signal (pairs [V; -V] would
waste half of them); training then bends it. The loss is binary cross-entropy in which missing a
neuron costs what energy recall loses by it, (|h_i| * norm(down_i))^2, over a base that counts every
miss, and a false alarm costs 1.
Dimension key: N tokens, D model width, R rank, F neurons.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from predictor import MlpPredictor
from predictor.files import write_safetensors
from predictor.kinds import whitening
from predictor.mlp import Int4MlpPredictor
from training_predictors.progress import progress_bar
from training_predictors.recording import LayerData, Recording

OPEN_SHIFT = 3.0  # standard deviations by which hidden units start above zero
START_GAIN = 8.0  # a regression onto {0, 1} times this is a fair first guess of a logit
WARMUP_STEPS = 20


class TrainingDiverged(ValueError):
    """The loss stopped being a number."""


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights of a layer, together with its recording and its rank."""

    epochs: int = 8
    batch_tokens: int = 256
    learning_rate: float = 0.05  # AdamW's step, as a share of a tensor's root mean square at start
    patience: int = 4  # epochs without a better held-out loss
    miss_cost: float = 1.0  # of any active neuron, in false alarms
    miss_cost_by_energy: float = 5.0  # times the neuron's share of the energy, mean 1 per token
    miss_cost_cap: float = 100.0  # largest such share that counts
    seed: int = 0


@dataclass(frozen=True)
class TrainedLayer:
    """A layer's predictor (threshold still 0) and what its training took."""

    predictor: MlpPredictor
    facts: dict[str, Any]


def cost_weights(magnitude_NF: Tensor, settings: TrainSettings) -> Tensor:
    """What a wrong answer costs: 1 for a silent neuron, more for an active one by its energy."""
    active_NF = magnitude_NF > 0
    energy_NF = magnitude_NF.square()
    mean_N1 = energy_NF.sum(1, keepdim=True) / active_NF.sum(1, keepdim=True).clamp(min=1)
    share_NF = (energy_NF / mean_N1.clamp(min=1e-20)).clamp(max=settings.miss_cost_cap)
    return torch.where(active_NF, settings.miss_cost + settings.miss_cost_by_energy * share_NF, 1.0)


def linear_start(x_ND: Tensor, active_NF: Tensor, rank: int) -> list[Tensor]:
    """fc1, bias_R, fc2, bias_F of the best rank-R linear regression of activity on the input."""
    x_ND, active_NF = x_ND.double(), active_NF.double()
    x_mean_D, _, whiten_DD = whitening(x_ND)
    active_mean_F = active_NF.mean(0)
    x_ND, active_NF = x_ND - x_mean_D, active_NF - active_mean_F
    cross_FD = active_NF.T @ x_ND / len(x_ND)
    left_FK, sizes_K, right_KD = torch.linalg.svd(cross_FD @ whiten_DD, full_matrices=False)
    fc1_RD = right_KD[:rank] @ whiten_DD  # each hidden unit has variance 1
    fc2_FR = START_GAIN * left_FK[:, :rank] * sizes_K[:rank]
    bias_R = OPEN_SHIFT - fc1_RD @ x_mean_D
    bias_F = START_GAIN * (active_mean_F - 0.5) - OPEN_SHIFT * fc2_FR.sum(1)
    return [tensor.float() for tensor in (fc1_RD, bias_R, fc2_FR, bias_F)]


def train_layer(
    train: LayerData,
    held_out: LayerData,
    rank: int,
    settings: TrainSettings,
    device: str = "cpu",
    start: list[Tensor] | None = None,
) -> TrainedLayer:
    """Train one layer; the weights with the least held-out loss, as int8, are the result.

    `start`: fc1, bias_R, fc2, bias_F to go on from, instead of the linear start.
    """
    begin = time.monotonic()
    generator = torch.Generator().manual_seed(settings.seed)
    x_ND = train.x_ND.to(device, torch.float32)
    magnitude_NF = train.magnitude_NF.to(device)
    if start is None:
        start = linear_start(x_ND, magnitude_NF > 0, rank)
    weights = [w.detach().clone().to(device).requires_grad_() for w in start]
    # Steps relative to each tensor's size: inputs differ in scale between layers and models.
    groups = [
        {"params": [w], "size": max(1e-6, float(w.detach().square().mean().sqrt()))}
        for w in weights
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99))
    batch = min(settings.batch_tokens, len(x_ND))
    steps_per_epoch = len(x_ND) // batch
    num_steps = settings.epochs * steps_per_epoch
    best_loss = held_out_loss(_quantized(weights), held_out, settings)
    best, best_epoch, epoch, step = _quantized(weights), 0, 0, 0
    for epoch in range(1, settings.epochs + 1):
        order_N = torch.randperm(len(x_ND), generator=generator).to(device)
        for index in range(steps_per_epoch):
            rows = order_N[index * batch : (index + 1) * batch]
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * group["size"] * _schedule(step, num_steps)
            loss = _loss(_forward(weights, x_ND[rows]), magnitude_NF[rows].float(), settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        candidate = _quantized(weights)
        loss_value = held_out_loss(candidate, held_out, settings)
        if not math.isfinite(loss_value):
            raise TrainingDiverged(
                f"the held-out loss became {loss_value} in epoch {epoch} at learning rate "
                f"{settings.learning_rate:g}; give a smaller --learning-rate."
            )
        if loss_value < best_loss:
            best, best_loss, best_epoch = candidate, loss_value, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    facts = {
        "rank": rank,
        "epochs": epoch,
        "best_epoch": best_epoch,
        "held_out_loss": best_loss,
        "seconds": time.monotonic() - begin,
    }
    return TrainedLayer(best.to("cpu"), facts)


def held_out_loss(
    predictor: MlpPredictor | Int4MlpPredictor, data: LayerData, settings: TrainSettings
) -> float:
    """Mean cost of the predictor, in its few bits, on tokens it was not trained on."""
    device = predictor.bias_R.device
    total = 0.0
    for begin in range(0, data.num_tokens, 1024):
        rows = slice(begin, begin + 1024)
        magnitude_NF = data.magnitude_NF[rows].to(device, torch.float32)
        loss = _loss(predictor.score(data.x_ND[rows].to(device)), magnitude_NF, settings)
        total += float(loss) * len(magnitude_NF)
    return total / data.num_tokens


def train_all(
    recording: Recording,
    ranks: list[int],
    folder: Path,
    settings: TrainSettings,
    *,
    device: str,
    console: Console,
) -> list[TrainedLayer]:
    """Train every layer that `folder` does not hold yet for these settings and rank."""
    done: dict[int, TrainedLayer] = {}
    for layer, rank in enumerate(ranks):
        found = _load_layer(_layer_path(folder, layer), rank, settings)
        if found is not None:
            done[layer] = found
    with progress_bar(console, "train", len(ranks), len(done)) as advance:
        for layer in [layer for layer in range(len(ranks)) if layer not in done]:
            trained = train_layer(
                recording.layer(layer, "train"),
                recording.layer(layer, "calibrate"),
                ranks[layer],
                settings,
                device,
            )
            _save_layer(_layer_path(folder, layer), trained, settings)
            done[layer] = trained
            advance(1, f"layer {layer}: {trained.facts['epochs']} epochs")
    return [done[layer] for layer in range(len(ranks))]


def _forward(weights: list[Tensor], x_ND: Tensor) -> Tensor:
    fc1_RD, bias_R, fc2_FR, bias_F = weights
    return torch.addmm(bias_F, torch.relu(torch.addmm(bias_R, x_ND, fc1_RD.T)), fc2_FR.T)


def _quantized(weights: list[Tensor]) -> MlpPredictor:
    fc1_RD, bias_R, fc2_FR, bias_F = weights
    return MlpPredictor.from_float(fc1_RD, bias_R, fc2_FR, bias_F)


def _loss(score_NF: Tensor, magnitude_NF: Tensor, settings: TrainSettings) -> Tensor:
    return functional.binary_cross_entropy_with_logits(
        score_NF, (magnitude_NF > 0).float(), weight=cost_weights(magnitude_NF, settings)
    )


def _schedule(step: int, num_steps: int) -> float:
    """Short linear warm-up, then a half cosine to zero."""
    return min(1.0, step / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / (num_steps + 1)))


def _layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


def _save_layer(path: Path, trained: TrainedLayer, settings: TrainSettings) -> None:
    facts = {"settings": asdict(settings), "facts": trained.facts}
    write_safetensors(path, trained.predictor.tensors, {"made": json.dumps(facts)})


def _load_layer(path: Path, rank: int, settings: TrainSettings) -> TrainedLayer | None:
    """The layer as an earlier run left it, if it was made with the same settings."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        made = json.loads(file.metadata()["made"])
        if made["settings"] != asdict(settings) or made["facts"]["rank"] != rank:
            return None
        parts = {part: file.get_tensor(name) for name, part in MlpPredictor.TENSORS.items()}
    return TrainedLayer(MlpPredictor(**parts, threshold=0.0), made["facts"])
