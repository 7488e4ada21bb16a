"""PowerInfer's predictor files, read and written: `model_{i}.pt` and `activation_{i}.pt`.

`model_{i}.pt` holds fc1.weight [R, D] and fc2.weight [F, R] of layer i, no biases: its engine keeps
the neurons with fc2 relu(fc1 x) >= threshold, one threshold for all layers (`sparse_threshold` in
config.json, 0 if absent). `activation_{i}.pt` holds how often each neuron fired.

Its x is the residual stream before the FFN's norm, ours the vector after it: x_normed = w x / rms.
Without biases the score grows in proportion to x, so fc1 with its columns divided by w gives on
x_normed the score of x over rms: at threshold 0 the very same neurons. At another threshold rms
would matter, and a predictor that sees x_normed alone does not know it.

Files are read without running what they might contain (`weights_only`).
Dimension key: N tokens, D model width, R predictor rank, F neurons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from predictor.files import replacing
from predictor.low_bits import INT8_MAX
from predictor.mlp import MlpPredictor, quantize_rows

FC1, FC2 = "fc1.weight", "fc2.weight"
CONFIG_FILE = "config.json"
THRESHOLD_KEY = "sparse_threshold"
CLIP_STEPS = 32  # scales tried: down to 1/65536 of the widest
TINY = float(np.finfo(np.float32).tiny)  # no score is nearer to zero but zero itself


class BadPowerInferFile(ValueError):
    """A file or folder is not what PowerInfer writes, or cannot be written in its format."""


@dataclass(frozen=True)
class BiasFreePredictor:
    """One layer as PowerInfer computes it, in fp32; x is the vector it was trained on."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    threshold: float = 0.0

    def select(self, x_ND: Tensor) -> Tensor:
        """mask_NF: score >= threshold, so a score of zero is selected at threshold 0."""
        score_NF = torch.relu(x_ND.float() @ self.fc1_RD.T) @ self.fc2_FR.T
        return score_NF >= self.threshold

    def folded(self, norm_D: Tensor) -> BiasFreePredictor:
        """The same selection from the vector after the norm, at threshold 0.

        What a weight of zero takes out of that vector no predictor behind it can see.
        """
        norm_D = norm_D.float()
        fc1_RD = torch.where(norm_D == 0, 0.0, self.fc1_RD / norm_D)
        return BiasFreePredictor(fc1_RD, self.fc2_FR, self.threshold)

    def as_mlp(self, size_D: Tensor | None = None) -> MlpPredictor:
        """Our form of it: int8 rows, zero biases, and a threshold that scores must exceed.

        `size_D` is how large each element of x is, up to a factor: what int8 loses is weighed with
        it. Where a norm's weight is nearly zero, folding makes columns that dwarf all others for
        elements that are next to nothing; a scale that held them would round the others away.
        """
        size_D = torch.ones(self.fc1_RD.shape[1]) if size_D is None else size_D.float().abs()
        zeros_R, zeros_F = torch.zeros(len(self.fc1_RD)), torch.zeros(len(self.fc2_FR))
        return MlpPredictor(
            *_quantize_weighted(self.fc1_RD, size_D),
            zeros_R,
            *quantize_rows(self.fc2_FR),
            zeros_F,
            threshold=_exceeded(self.threshold),
        )


def _quantize_weighted(weight_RD: Tensor, size_D: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and fp32 row scales with the least sum of squared errors times size_D, clipping
    what is beyond the scale."""
    q_RD, scale_R = quantize_rows(weight_RD)
    error_R = ((weight_RD - q_RD * scale_R[:, None]) * size_D).square().sum(1)
    widest_R = scale_R
    for step in range(1, CLIP_STEPS + 1):
        tried_R = widest_R * 2 ** (-step / 2)
        safe_R1 = torch.where(tried_R > 0, tried_R, 1.0)[:, None]
        tried_RD = (weight_RD / safe_R1).round().clamp(-INT8_MAX, INT8_MAX)
        tried_error_R = ((weight_RD - tried_RD * tried_R[:, None]) * size_D).square().sum(1)
        is_better_R = tried_error_R < error_R
        q_RD = torch.where(is_better_R[:, None], tried_RD.to(torch.int8), q_RD)
        scale_R = torch.where(is_better_R, tried_R, scale_R)
        error_R = torch.minimum(error_R, tried_error_R)
    return q_RD, scale_R


def unfolded(predictor: MlpPredictor, norm_D: Tensor) -> BiasFreePredictor:
    """Our predictor as PowerInfer computes it: the same selection from the vector before the norm.

    Raises BadPowerInferFile where that form cannot hold it.
    """
    if bool(predictor.bias_R.any()) or bool(predictor.bias_F.any()):
        raise BadPowerInferFile("it has biases")
    theirs = _reached(predictor.threshold)
    if abs(theirs) > TINY:
        raise BadPowerInferFile(f"its threshold is {predictor.threshold:.4g} instead of 0")
    return BiasFreePredictor(predictor.fc1_RD * norm_D.float(), predictor.fc2_FR, theirs)


def _exceeded(threshold: float) -> float:
    """The fp32 value that exactly those scores exceed that reach `threshold`."""
    if threshold == 0:
        return -TINY  # the next lower fp32 is so small that processors may take it for zero
    return float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))


def _reached(threshold: float) -> float:
    """The reverse of `_exceeded`."""
    if threshold in (0.0, -TINY):
        return 0.0 if threshold else TINY
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))


# -- reading ---------------------------------------------------------------------------------------


def layer_files(folder: Path, stem: str, num_layers: int) -> list[Path]:
    """`{stem}_0.pt` to `{stem}_{num_layers - 1}.pt` in the order of layers; none may be missing."""
    name = re.compile(rf"{stem}_(0|[1-9]\d*)\.pt")
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := name.fullmatch(path.name))
    }
    if missing := [layer for layer in range(num_layers) if layer not in found]:
        raise BadPowerInferFile(
            f"`{folder}` lacks {_names(stem, missing)}: the model has {num_layers} layers, and "
            "each needs its file."
        )
    if extra := sorted(layer for layer in found if layer >= num_layers):
        raise BadPowerInferFile(
            f"`{folder}` has {_names(stem, extra)}, but the model has {num_layers} layers: these "
            "files belong to another model."
        )
    return [found[layer] for layer in range(num_layers)]


def holds(folder: Path, stem: str) -> bool:
    """Whether there is any such file."""
    return any(folder.glob(f"{stem}_*.pt"))


def _names(stem: str, layers: Sequence[int]) -> str:
    shown = ", ".join(f"{stem}_{layer}.pt" for layer in layers[:8])
    return shown if len(layers) <= 8 else f"{shown} and {len(layers) - 8} more"


def read_predictor(
    path: Path, d_model: int, num_neurons: int, threshold: float = 0.0
) -> BiasFreePredictor:
    """One `model_{i}.pt`, checked against the model's sizes."""
    weights = _load(path)
    names = sorted(map(str, weights)) if isinstance(weights, dict) else []
    if names != [FC1, FC2]:
        raise BadPowerInferFile(
            f"`{path}` must hold {FC1} and {FC2} and nothing else, it holds "
            f"{', '.join(names[:6]) or type(weights).__name__}: PowerInfer's predictors are two "
            "matrices without biases."
        )
    assert isinstance(weights, dict)
    fc1_RD, fc2_FR = (_matrix(path, name, weights[name]) for name in (FC1, FC2))
    rank = fc1_RD.shape[0]
    for name, matrix, expected in (
        (FC1, fc1_RD, (rank, d_model)),
        (FC2, fc2_FR, (num_neurons, rank)),
    ):
        if tuple(matrix.shape) != expected:
            raise BadPowerInferFile(
                f"`{path}`: {name} has shape {tuple(matrix.shape)}, this model (width {d_model}, "
                f"{num_neurons} neurons) needs {expected}: the file belongs to another model."
            )
    return BiasFreePredictor(fc1_RD, fc2_FR, threshold)


def _matrix(path: Path, name: str, value: Any) -> Tensor:
    is_matrix = isinstance(value, Tensor) and value.layout == torch.strided and value.ndim == 2
    if not is_matrix or not value.is_floating_point() or value.numel() == 0:
        raise BadPowerInferFile(f"`{path}`: {name} must be a matrix of floating-point numbers.")
    matrix: Tensor = value.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(matrix).all()):
        raise BadPowerInferFile(f"`{path}`: {name} holds values that are not finite.")
    return matrix


def read_counts(path: Path, num_neurons: int) -> Tensor:
    """One `activation_{i}.pt`: count_F, int64."""
    value = _load(path)
    is_vector = isinstance(value, Tensor) and value.layout == torch.strided
    if not is_vector or tuple(value.shape) != (num_neurons,) or value.is_complex():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BadPowerInferFile(
            f"`{path}` must hold one count for each of the model's {num_neurons} neurons, it "
            f"holds {shape}."
        )
    count_F = value.detach().to(torch.float64)
    if not bool(((count_F >= 0) & (count_F < 2**53) & (count_F == count_F.floor())).all()):
        raise BadPowerInferFile(
            f"`{path}` holds values that are no counts; give whole numbers, 0 or more (shares must "
            "be multiplied with the number of tokens)."
        )
    whole_F: Tensor = count_F.to(torch.int64)
    return whole_F


def read_threshold(folder: Path) -> float:
    """`sparse_threshold` of the folder's config.json; 0 without one, as PowerInfer takes it."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return 0.0
    try:
        threshold = float(json.loads(path.read_text(encoding="utf-8")).get(THRESHOLD_KEY, 0.0))
    except (AttributeError, TypeError, ValueError) as error:
        raise BadPowerInferFile(f"`{path}` cannot be read: {error}.") from error
    if not np.isfinite(threshold):
        raise BadPowerInferFile(f"`{path}`: {THRESHOLD_KEY} is not finite.")
    return threshold


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can fail in any way; whichever it was, the file is of no use.
        raise BadPowerInferFile(
            f"`{path}` is damaged, or holds more than tensors and is not opened for that reason "
            f"({type(error).__name__}). Save it again with `torch.save(tensors, path)`."
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def write_predictor(path: Path, predictor: BiasFreePredictor) -> None:
    _save(path, {FC1: predictor.fc1_RD.contiguous(), FC2: predictor.fc2_FR.contiguous()})


def write_counts(path: Path, count_F: Tensor) -> None:
    _save(path, count_F.clone())


def _save(path: Path, value: Any) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(value, file)
