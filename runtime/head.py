"""Final norm and LM head: from the residual stream to logits.

A greedy step needs the likeliest token, not every logit, and in a small model the head is a third
of what a step reads. So for such a step of one sequence a copy of the head in 8 bits, half as much
memory to read, says which tokens can be the likeliest at all; their logits are then computed as
always. The bound on the copy's error holds for every input (Cauchy-Schwarz on what rounding left
over, plus the sums' rounding), so the token is always that of the full head.
Dimensions: N tokens, D model width, V vocabulary, C groups of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        self.weight_VD = head_VD
        self._norm_D, self._eps, self._uses_cpp = norm_D, eps, uses_cpp
        self._screen = _Screen.of(head_VD) if uses_cpp and isinstance(head_VD, Tensor) else None

    @property
    def screen_bytes(self) -> int:
        """What the copy in 8 bits takes; 0 where there is none."""
        return 0 if self._screen is None else self._screen.num_bytes

    def logits(self, x_ND: Tensor) -> Tensor:
        """fp32 to the end: bf16 sums near 25 are 1/8 apart, enough to turn a first token."""
        if self._uses_cpp:
            from .kernels.cpu import norm_linear

            return norm_linear(x_ND, self._norm_D, self._eps, self.weight_VD)
        return linear_fp32(rms_norm(x_ND, self._norm_D, self._eps), self.weight_VD)

    def greedy_logits(self, x_ND: Tensor) -> Tensor:
        """As `logits` for every token that can be the likeliest of its row; of the others a number
        that is smaller than the largest.

        Of a single row: several share one reading of the head, and then candidates cost more than
        the copy spares (5 % of a step of two to eight).
        """
        if self._screen is None or len(x_ND) != 1:
            return self.logits(x_ND)
        from .kernels.cpu import rms_norm

        logits_V = self._screen.logits(rms_norm(x_ND, self._norm_D, self._eps)[0])
        return self.logits(x_ND) if logits_V is None else logits_V[None]


class _Screen:
    """The head in 8 bits, and how far its products can be from the head's.

    For a row w and its copy w', an input x and what the kernel makes of it, x' (8 bits as well):
    |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'|.
    """

    def __init__(self, head_VD: Tensor) -> None:
        from .kernels.cpu import pack
        from .kernels.quantized import GROUP, QuantizedMatrix

        self._head_VD, self._group = head_VD, GROUP
        self._copy = QuantizedMatrix.of(head_VD, 8, lambda rows_OB: pack([rows_OB])[0])
        self._missing_V, self._size_V = np.empty(len(head_VD)), np.empty(len(head_VD))
        for start in range(0, len(head_VD), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            copy_OD = self._copy[rows].float().double()
            self._missing_V[rows] = (head_VD[rows].double() - copy_OD).norm(dim=1).numpy()
            self._size_V[rows] = copy_OD.norm(dim=1).numpy()
        self._missing, self._size = self._missing_V.max(), self._size_V.max()

    @classmethod
    def of(cls, head_VD: Tensor) -> _Screen | None:
        """None for what has no groups, or weights that are not finite."""
        try:
            return cls(head_VD)
        except ValueError:
            return None

    @property
    def num_bytes(self) -> int:
        return self._copy.nbytes + self._missing_V.nbytes + self._size_V.nbytes

    def logits(self, normed_D: Tensor) -> Tensor | None:
        """See Head.greedy_logits. None: there is no bound, or it leaves too many."""
        from .kernels.cpu import linear

        logits_V = linear(normed_D[None], self._copy)[0]
        found = self._candidates(normed_D.numpy(), logits_V.numpy())
        if found is None:
            return None
        ids = torch.from_numpy(found)
        logits_V[ids] = linear(normed_D[None], self._head_VD[ids])[0]
        return logits_V

    def _candidates(self, x_D: np.ndarray, copied_V: np.ndarray) -> np.ndarray | None:
        """Numbers of the tokens that can be the likeliest, by the copy's logits."""
        x = x_D.astype(np.float64)
        x_size = np.sqrt(x @ x)
        if not np.isfinite(x_size):
            return None
        x_missing = self._missing_of(x_D)
        # What sums in fp32 are off by at most, in any order, on both sides.
        sums = 2 * (len(x) + 16) * UNIT_ROUNDOFF * (x_size + x_missing)

        def error(missing: Any, size: Any) -> Any:
            return missing * x_size + size * x_missing + sums * (size + missing)

        # First by one bound for all, which leaves few to bound one by one.
        least = copied_V.max() - 2 * error(self._missing, self._size)
        if not np.isfinite(least):
            return None
        ids = np.flatnonzero(copied_V >= np.float32(least))
        copied = copied_V[ids].astype(np.float64)
        errors = error(self._missing_V[ids], self._size_V[ids])
        ids = ids[copied + errors >= (copied - errors).max()]
        return ids if len(ids) <= MAX_CANDIDATE_SHARE * len(copied_V) else None

    def _missing_of(self, x_D: np.ndarray) -> float:
        """|x - x'|, with x rounded as the kernels do: low_bits.rounded_inputs in numpy, for torch
        takes so long over so few numbers that the kernels' threads fall asleep."""
        groups = x_D.reshape(-1, self._group)
        tiny = np.finfo(np.float32).tiny
        scale = np.maximum(np.abs(groups).max(1, keepdims=True) / np.float32(127), tiny)
        missing = groups.astype(np.float64) - np.rint(groups / scale) * scale.astype(np.float64)
        return float(np.sqrt(np.square(missing).sum()))
