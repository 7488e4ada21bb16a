"""Final norm and LM head: from the residual stream to logits.

A greedy step needs the likeliest token, not every logit, and in a small model the head is a third
of what a step reads. So for such steps a copy of the head in 8 bits, half as much memory to read,
says which tokens can be the likeliest at all; their logits are then computed as always. The bound
on the copy's error holds for every input (Cauchy-Schwarz on what rounding left over, plus the sums'
rounding), so the token is always that of the full head.
Dimensions: N tokens, D model width, V vocabulary, C groups of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .torch_ops import linear_fp32, rms_norm

if TYPE_CHECKING:  # the extension may not be built
    from .kernels.quantized import Weight

UNIT_ROUNDOFF = 2.0**-24
# Of the vocabulary: with more candidates than that, one pass over the whole head is as fast.
MAX_CANDIDATE_SHARE = 1 / 8
BLOCK_ROWS = 8192  # of the head that are compared with their copies at a time


class Head:
    """`norm_D` fp32; `head_VD` where the model computes."""

    def __init__(self, norm_D: Tensor, head_VD: Weight, eps: float, *, uses_cpp: bool) -> None:
        self._norm_D, self._head_VD, self._eps, self._uses_cpp = norm_D, head_VD, eps, uses_cpp
        self._screen = _Screen.of(head_VD) if uses_cpp and isinstance(head_VD, Tensor) else None

    @property
    def screen_bytes(self) -> int:
        """What the copy in 8 bits takes; 0 where there is none."""
        return 0 if self._screen is None else self._screen.num_bytes

    def logits(self, x_ND: Tensor) -> Tensor:
        """fp32 to the end: bf16 sums near 25 are 1/8 apart, enough to turn a first token."""
        if self._uses_cpp:
            from .kernels.cpu import norm_linear

            return norm_linear(x_ND, self._norm_D, self._eps, self._head_VD)
        return linear_fp32(rms_norm(x_ND, self._norm_D, self._eps), self._head_VD)

    def greedy_logits(self, x_ND: Tensor) -> Tensor:
        """As `logits` for every token that can be the likeliest of its row; of the others a number
        that is smaller than the largest."""
        if self._screen is None:
            return self.logits(x_ND)
        from .kernels.cpu import rms_norm

        normed_ND = rms_norm(x_ND, self._norm_D, self._eps)
        logits_NV = self._screen.logits(normed_ND)
        return self.logits(x_ND) if logits_NV is None else logits_NV


class _Screen:
    """The head in 8 bits, and how far its products can be from the head's.

    For a row w and its copy w', an input x and what the kernel makes of it, x' (8 bits as well):
    |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'|, with the largest of each over the rows.
    """

    def __init__(self, head_VD: Tensor) -> None:
        from .kernels.cpu import HugePages
        from .kernels.quantized import GROUP, QuantizedMatrix

        self._head_VD, self._group = head_VD, GROUP
        self._copy = QuantizedMatrix.of(head_VD, 8, HugePages(head_VD.nbytes).copy)
        self._rounding = self._copy_size = 0.0
        for start in range(0, len(head_VD), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            copy_OD = self._copy[rows].float().double()
            missing_OD = head_VD[rows].double() - copy_OD
            self._rounding = max(self._rounding, float(missing_OD.norm(dim=1).max()))
            self._copy_size = max(self._copy_size, float(copy_OD.norm(dim=1).max()))

    @classmethod
    def of(cls, head_VD: Tensor) -> _Screen | None:
        """None for what has no groups, or weights that are not finite."""
        try:
            return cls(head_VD)
        except ValueError:
            return None

    @property
    def num_bytes(self) -> int:
        return self._copy.nbytes

    def logits(self, normed_ND: Tensor) -> Tensor | None:
        """See Head.greedy_logits. None: there is no bound, or it leaves too many."""
        from .kernels.cpu import linear

        logits_NV = linear(normed_ND, self._copy)
        for normed_D, logits_V in zip(normed_ND, logits_NV.numpy(), strict=True):
            least = float(logits_V.max()) - 2 * self._error(normed_D.numpy())
            if not np.isfinite(least):
                return None
            # fp32 can be above `least` by half a step, which the sums' share of the error covers
            ids = np.flatnonzero(logits_V >= np.float32(least))
            if len(ids) > MAX_CANDIDATE_SHARE * len(logits_V):
                return None
            rows_OD = self._head_VD[torch.from_numpy(ids)]
            logits_V[ids] = linear(normed_D[None], rows_OD)[0].numpy()
        return logits_NV

    def _error(self, x_D: np.ndarray) -> float:
        """The most by which a product can be off, in any order of its sums."""
        D = len(x_D)
        x = x_D.astype(np.float64)
        x_size = np.sqrt(x @ x)
        if not np.isfinite(x_size):
            return np.inf
        step_C = np.abs(x).reshape(-1, self._group).max(1) / 127
        # each column is off by half a step, and a little for the division in fp32
        x_rounding = 0.5 * np.sqrt(self._group * (step_C @ step_C)) * (1 + 256 * UNIT_ROUNDOFF)
        sizes = (self._copy_size + self._rounding) * (x_size + x_rounding)
        sums = 2 * (D + 16) * UNIT_ROUNDOFF * sizes
        return float(self._rounding * x_size + self._copy_size * x_rounding + sums)
