"""Stage 2 for the kinds that need no training: each layer's predictor out of its gate, or out of a
network that was trained.

`svd` also looks at recorded inputs; the others need them only for the threshold, which is stage 3.
Dimension key: N tokens, D model width, F neurons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from predictor import Predictor
from predictor.fingerprint import read_gate
from predictor.kinds import BITS_OF_KIND, SIGNS_PER_BYTE, of_gate, svd_predictor
from predictor.low_bits import GROUP
from predictor.mlp import Int4MlpPredictor
from training_predictors.compare import COVARIANCE_TOKENS
from training_predictors.progress import progress_bar
from training_predictors.ranks import RANKED_KINDS
from training_predictors.recording import LayerData, Recording
from training_predictors.train import TrainedLayer, TrainSettings, held_out_loss


@dataclass(frozen=True)
class BuiltLayer:
    """A layer's predictor (threshold still the untuned guess) and what its making took."""

    predictor: Predictor
    facts: dict[str, Any]


def check_kind(
    kind: str, d_model: int, *, rank: int | None, byte_budget: int | None, compare: bool
) -> None:
    """Raises ValueError for what this kind of predictor does not have: a size, a peer, a width."""
    flags = {"--rank": rank is not None, "--byte-budget": byte_budget is not None}
    given = [flag for flag, is_given in flags.items() if is_given]
    if given and kind not in RANKED_KINDS:
        raise ValueError(
            f"{' and '.join(given)} given, but the size of --kind {kind} follows from the model; "
            f"leave it out, or choose --kind {' or '.join(RANKED_KINDS)}."
        )
    if compare and kind != "mlp":
        raise ValueError(
            f"--compare sets the other kinds beside a trained one; leave out --kind {kind}."
        )
    in_groups = dict.fromkeys((*BITS_OF_KIND, "mlp-int4"), GROUP)
    step = {"sign": SIGNS_PER_BYTE, **in_groups}.get(kind, 1)
    if d_model % step:
        raise ValueError(
            f"--kind {kind} takes {step} columns at a time, and this model's width {d_model} is no "
            "multiple of that; choose --kind mlp or svd."
        )


def build_layer(
    kind: str,
    gate_FD: Tensor,
    inputs: Callable[[], Tensor],
    rank: int | None,
    activation_threshold: float,
) -> BuiltLayer:
    """`inputs` gives recorded x_ND to a kind that looks at them; `rank` is for `svd`."""
    begin = time.monotonic()
    predictor: Predictor
    if kind == "svd":
        assert rank is not None, "svd has a rank"
        x_ND = inputs()[:COVARIANCE_TOKENS]
        predictor = svd_predictor(gate_FD, x_ND, rank, activation_threshold)
    else:
        predictor = of_gate(kind, gate_FD, 0.0 if kind == "sign" else activation_threshold)
    facts: dict[str, Any] = {} if rank is None else {"rank": rank}
    return BuiltLayer(predictor, facts | {"seconds": time.monotonic() - begin})


def in_int4(trained: TrainedLayer, held_out: LayerData, settings: TrainSettings) -> BuiltLayer:
    """The trained network in 4 bits: with its own loss, and the rank that fills its groups."""
    predictor = Int4MlpPredictor.of(trained.predictor)
    loss = held_out_loss(predictor, held_out, settings)
    return BuiltLayer(predictor, trained.facts | {"rank": predictor.rank, "held_out_loss": loss})


def build_all(
    kind: str,
    model_dir: Path,
    recording: Recording,
    ranks: Sequence[int | None],
    activation_thresholds: Sequence[float],
    console: Console,
) -> list[BuiltLayer]:
    """Every layer's predictor, in order."""
    layers = []
    with progress_bar(console, "build", len(ranks)) as advance:
        for layer, rank in enumerate(ranks):

            def inputs(layer: int = layer) -> Tensor:
                return recording.layer(layer, "train").x_ND

            gate_FD = read_gate(model_dir, layer)
            threshold = activation_thresholds[layer]
            layers.append(build_layer(kind, gate_FD, inputs, rank, threshold))
            advance(1)
    return layers
