"""The progressive L1 schedule of ProSparse (Algorithm 1, appendix B) and its steering.

Progress runs from 0 to 1 over the training budget, so one recipe serves any number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One stage: it ends at progress `until`, with L1 weight `peak` and FATReLU `threshold`."""

    until: float
    peak: float
    threshold: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Stages in order. The first holds its weight; each later one climbs from the one before.

    The climb is a half sine: eta = (sin(-pi/2 + pi p) + 1) / 2 for p = share of the stage done.
    Two stages of equal weight make a constant stretch.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0:
            raise ValueError(f"stages must end at rising shares of training up to 1.0, got {ends}")
        peaks = [stage.peak for stage in self.stages]
        if peaks[0] < 0 or peaks != sorted(peaks):
            raise ValueError(f"L1 weights must not fall from stage to stage, got {peaks}")

    def _stage(self, progress: float) -> int:
        for i, stage in enumerate(self.stages):
            if progress <= stage.until:
                return i
        return len(self.stages) - 1

    def l1_weight(self, progress: float) -> float:
        i = self._stage(progress)
        if i == 0:
            return self.stages[0].peak
        start, end = self.stages[i - 1], self.stages[i]
        done = min(1.0, (progress - start.until) / (end.until - start.until))
        eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * done) + 1)
        return start.peak + eta * (end.peak - start.peak)

    def threshold(self, progress: float) -> float:
        return self.stages[self._stage(progress)].threshold


STEER_BY = ("layer", "mean")
INTEGRATE_WITHIN = 0.05  # further from the target the integral would wind up
INTEGRAL_LIMIT = 6.0


@dataclass
class Steering:
    """Factor on the L1 weight that leads to a target sparsity: a PI controller in log space.

    Without it the sparsity that a weight leads to depends on model, data and length of training
    (ProSparse, section 4.4, fits a curve for one model); with it the target does the choosing.
    `by` "layer": every layer is steered to the target; "mean": all get one factor, and the layers
    find their own sparsities. `gain` answers the distance to the target now, `rate` lets it add up
    (per 100,000 tokens), so that a target is reached and not only approached. Both 0: no steering.
    """

    target: float
    gain: float
    rate: float = 0.0
    by: str = "layer"
    integral: float | list[float] = 0.0

    def __post_init__(self) -> None:
        if self.by not in STEER_BY:
            raise ValueError(f"steer_by must be one of {', '.join(STEER_BY)}, is {self.by!r}")

    def factor_L(self, sparsity_L: Tensor, tokens: int) -> Tensor:
        """Above 1 where it is denser than the target; `tokens` passed since the last call."""
        seen_L = sparsity_L if self.by == "layer" else sparsity_L.mean().expand_as(sparsity_L)
        error_L = self.target - seen_L
        near_L = torch.where(error_L.abs() < INTEGRATE_WITHIN, error_L, 0.0)
        integral_L = (
            torch.as_tensor(self.integral, device=error_L.device)
            + (self.rate * tokens / 1e5) * near_L
        )
        integral_L = integral_L.clamp(-INTEGRAL_LIMIT, INTEGRAL_LIMIT)
        self.integral = integral_L.tolist()
        return (self.gain * error_L + integral_L).exp()
