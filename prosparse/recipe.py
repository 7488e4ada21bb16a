"""A training recipe: every setting of a run, read from TOML (recipes/*.toml)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .modeling import SPARSE_ACTIVATIONS
from .schedule import Stage, Steering

LANGUAGE_LOSSES = ("distillation", "next-token")


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Defaults are the ones of recipes/default.toml."""

    language_loss: str = "distillation"
    activation: str = "relu"
    total_tokens: int = 1_750_000
    row_length: int = 384
    rows_per_step: int = 4
    chat_share: float = 0.55
    peak_lr: float = 1.5e-3
    warmup: float = 0.02
    ffn_rank: int | None = 64
    attention_rank: int | None = 16
    kl_positions: float = 0.5
    hidden_weight: float = 0.15
    hidden_every: int = 3
    target_sparsity: float = 0.83
    steer_gain: float = 6.0
    steer_rate: float = 0.0
    steer_by: str = "layer"
    clip_norm: float = 1.0
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(0.05, 0.0),
        Stage(0.12, 0.3),
        Stage(0.31, 0.35),
        Stage(0.45, 0.35, 0.1),
        Stage(1.0, 0.35, 0.2),
    )

    def __post_init__(self) -> None:
        for name, known in (("language_loss", LANGUAGE_LOSSES), ("activation", SPARSE_ACTIVATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, is {value!r}")
        self.steering()  # refuses what it does not know

    def steering(self) -> Steering:
        return Steering(self.target_sparsity, self.steer_gain, self.steer_rate, self.steer_by)

    @classmethod
    def from_toml(cls, path: Path) -> TrainConfig:
        values = tomllib.loads(path.read_text())
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown settings {unknown}; known: {sorted(known)}")
        if "stages" in values:
            values["stages"] = tuple(Stage(**stage) for stage in values["stages"])
        # TOML has no null: rank 0 stands for full-parameter training
        for key in ("ffn_rank", "attention_rank"):
            if values.get(key) == 0:
                values[key] = None
        return cls(**values)
