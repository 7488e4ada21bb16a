"""All layers of a decode step in one call of the C++ kernels.

With a small model a good part of a step is the way from Python to a layer and back. The bits are
those of calling `CpuAttention.forward` and `CpuFfn.forward_residual` layer by layer.
Dimension key: N tokens, D model width.
"""

from collections.abc import Sequence

from torch import Tensor

from . import _cpu_ext
from .cpu import CpuAttention, CpuFfn, KvBatch, Mode


class CpuLayers:
    """Layers that follow each other, each an attention block, the norm of its FFN, and its FFN."""

    def __init__(
        self,
        attentions: Sequence[CpuAttention],
        ffn_norms: Sequence[Tensor],
        ffns: Sequence[CpuFfn],
        eps: float,
    ) -> None:
        self._kept_alive = (tuple(attentions), tuple(ffn_norms), tuple(ffns))  # pointed to
        self._native = _cpu_ext.DecodeLayers(
            [attention.native for attention in attentions],
            list(ffn_norms),
            [ffn.native for ffn in ffns],
            eps,
        )

    def forward(
        self, x_ND: Tensor, kv: KvBatch, runs: Sequence[tuple[slice, Mode]]
    ) -> tuple[float, float]:
        """Updates the residual stream in place and writes to the pools of `kv`. `runs`: which
        tokens run their FFNs in which mode; all tokens, one run behind the other.

        Returns the seconds that attention and FFNs took.
        """
        return self._native.forward(
            x_ND, kv.native, [(rows.start, rows.stop, mode) for rows, mode in runs]
        )
