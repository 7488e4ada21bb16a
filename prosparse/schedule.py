"""The progressive L1 schedule of ProSparse (Algorithm 1, appendix B) and its steering.

Progress runs from 0 to 1 over the training budget, so one recipe serves any number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def steer(sparsity_L: Tensor, target: float, gain: float) -> Tensor:
    """Factor on each layer's L1 weight: above 1 while the layer is denser than the target.

    A proportional controller in log space. Without it the mean sparsity a weight leads to depends
    on model, data and length of training; with it the target does the choosing.
    """
    return ((target - sparsity_L) * gain).exp()
