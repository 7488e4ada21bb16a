"""The CPU backend: Python face of the compiled module `_cpu_ext`.

Turns tensors into calls and keeps the tensors alive; the C++ side checks dtype, shape and
contiguity of each one, releases the GIL and computes. Activations are fp32; weights are fp32, bf16
or in 8 or 4 bits (quantized.py); all row-major on the CPU. Results do not depend on the number of
threads, nor on which other tokens stand in the same call.
Dimension key: N tokens, D model width, O outputs of a linear, F neurons, H query heads,
G kv heads, K head width, S positions, B blocks of T positions, R predictor rank, L layers,
C = (H + 2G) K.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from predictor import MlpPredictor, Predictor
from predictor.kinds import GateCopy, SignGate
from predictor.mlp import Int4MlpPredictor

from . import _cpu_ext
from .quantized import Weight, by_hidden_unit, native, strips

Mode = Literal["dense", "exact", "predicted"]
HUGE_PAGE = 2 * 1024 * 1024
ALIGNMENT = 128  # bytes: two cache lines, which some CPUs read as a pair


def num_threads() -> int:
    """Threads that take part in a kernel, the calling one included."""
    return _cpu_ext.num_threads()


def set_num_threads(count: int | None) -> None:
    """None: as many as the affinity mask and the cgroup's CPU quota allow (also the default)."""
    _cpu_ext.set_num_threads(0 if count is None else count)


def set_spin_time(microseconds: int) -> None:
    """How long the kernels' threads look for work before they sleep; 0: the default. Longer where
    an accelerator's part of each layer comes between two calls."""
    _cpu_ext.set_spin_time(microseconds)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine runs, best first; 'generic' is always last."""
    return tuple(_cpu_ext.available_isas())


def isa() -> str:
    """The instruction set in use: 'amx', 'avx512vnni', 'avx512', 'avx2' or 'generic'."""
    return _cpu_ext.isa()


def force_isa(name: str | None) -> None:
    """Use this instruction set from now on (tests); None returns to the best one."""
    _cpu_ext.force_isa(name if name is not None else "")


class HugePages:
    """Hands out copies of tensors in memory that may be mapped by huge pages.

    Reading scattered rows is otherwise held up by page table walks; results are the same. Where the
    system has no huge pages on request (Linux: transparent_hugepage), the memory is ordinary. A
    block is freed with the last of its copies; what is not handed out of it is never touched.
    """

    def __init__(self, block_bytes: int = 256 * 1024 * 1024) -> None:
        self._block_bytes = block_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy at a cache line's start."""
        size = tensor.numel() * tensor.element_size()
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if taken > len(self._free):
            self._free = self._new_block(max(self._block_bytes, taken))
        part, self._free = self._free[:size], self._free[taken:]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @staticmethod
    def _new_block(size: int) -> Tensor:
        block = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(block, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
        return memory[start : start + size]


def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, one behind the other in huge pages."""
    sizes = [tensor.numel() * tensor.element_size() + ALIGNMENT for tensor in tensors]
    memory = HugePages(sum(sizes))
    return [memory.copy(tensor) for tensor in tensors]


def linear(x_ND: Tensor, w_OD: Weight, out: Tensor | None = None) -> Tensor:
    """y_NO = x w^T. A weight row is read once for all tokens; meant for N up to about 32."""
    if out is None:
        out = x_ND.new_empty(x_ND.shape[0], w_OD.shape[0])
    _cpu_ext.linear(x_ND, native(w_OD), out)
    return out


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """y_ND = x / sqrt(mean(x^2) + eps) * weight."""
    if out is None:
        out = torch.empty_like(x_ND)
    _cpu_ext.rms_norm(x_ND, weight_D, eps, out)
    return out


def norm_linear(
    x_ND: Tensor, norm_D: Tensor, eps: float, w_OD: Weight, out: Tensor | None = None
) -> Tensor:
    """y_NO = rms_norm(x) w^T in one call: the final norm and the LM head."""
    if out is None:
        out = x_ND.new_empty(x_ND.shape[0], w_OD.shape[0])
    _cpu_ext.norm_linear(x_ND, norm_D, eps, native(w_OD), out)
    return out


class KvBatch:
    """Where the keys and values of this step's tokens live; made once per step.

    Token n is of the sequence whose position p is row p % T of block `tables[n][p // T]` (int64) of
    `pools[n]`, one contiguous tensor [B, L, 2, G, T, K]. Its keys and values are written at
    `positions[n]`, and it attends to positions 0..positions[n]. Tokens of one sequence may stand in
    one batch at ascending positions (a short prompt): all of a layer are written before any is
    read.
    """

    __slots__ = ("native", "pools")

    def __init__(
        self, pools: Sequence[Tensor], tables: Sequence[Tensor], positions: Sequence[int]
    ) -> None:
        self.pools = tuple(pools)
        self.native = _cpu_ext.KvBatch(list(pools), list(tables), list(positions))

    def __len__(self) -> int:
        return len(self.pools)


def attention(
    qkv_NC: Tensor,
    kv: KvBatch,
    layer: int,
    cos_SK: Tensor,
    sin_SK: Tensor,
    num_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates q and k in place (half-split rotary), appends k and v, attends: out_N(HK), fp32.

    `cos_SK`, `sin_SK`: fp32 [max positions, K / 2], one angle per pair (i, i + K/2).
    """
    if out is None:
        out = qkv_NC.new_empty(qkv_NC.shape[0], num_heads * 2 * cos_SK.shape[1])
    _cpu_ext.attention(qkv_NC, kv.native, layer, cos_SK, sin_SK, num_heads, out)
    return out


class CpuAttention:
    """One layer's attention block: x += attention(rms_norm(x) qkv^T) o^T, in place."""

    def __init__(
        self,
        layer: int,
        norm_D: Tensor,
        qkv_CD: Weight,
        o_DC: Weight,
        cos_SK: Tensor,
        sin_SK: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        """`qkv_CD`: rows of q, then k, then v. `o_DC`: [D, H K]. `layer` indexes the KV pools."""
        self._kept_alive = (norm_D, qkv_CD, o_DC, cos_SK, sin_SK)
        self.native = _cpu_ext.Attention(
            layer, norm_D, native(qkv_CD), native(o_DC), cos_SK, sin_SK, num_heads, num_kv_heads,
            eps,
        )  # fmt: skip

    def forward(self, x_ND: Tensor, kv: KvBatch) -> None:
        """Updates the residual stream x_ND in place and writes to the pools of `kv`."""
        self.native.forward(x_ND, kv.native)


@dataclass(frozen=True)
class FfnCounts:
    """Sums over `calls` calls with `batch` tokens each. Selected: gate rows read, active: h != 0,
    each by token; united: neurons active for at least one token of the call."""

    mode: Mode
    batch: int
    calls: int
    selected: int
    active: int
    united: int


@dataclass(frozen=True)
class FfnUsage:
    """What an FFN did. The seconds add up to the duration of its calls: each stage's share of the
    time of all threads, and `wait_s`, in which threads had nothing to do."""

    counts: tuple[FfnCounts, ...]
    select_s: float
    gate_s: float
    up_down_s: float
    wait_s: float


class CpuFfn:
    """One layer's FFN: y = (act(x gate^T) * (x up^T)) down, act(g) = g if g > threshold, or SiLU.

    `down_FD` is stored transposed, so neuron i is row i of all three matrices. Modes:
    dense      every gate, up and down row is read;
    exact      every gate row; up only where the gate fires; down only where h != 0.
               Bit-identical to dense as long as the weights are finite.
    predicted  the predictor first, gate only where it selects, then as exact.
    Rows that are not needed are never read. SiLU, which is never zero, runs dense only. One call at
    a time per object (calls are serialised).
    """

    def __init__(
        self,
        gate_FD: Weight,
        up_FD: Weight,
        down_FD: Weight,
        threshold: float = 0.0,
        predictor: Predictor | None = None,
        *,
        silu: bool = False,
        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """`keep` copies what is made of the predictor to where it shall stay."""
        self._kept_alive: list[Weight] = [gate_FD, up_FD, down_FD]  # native code holds pointers
        self._counter: Tensor | None = None
        self.num_neurons, self.d_model = gate_FD.shape
        self.has_predictor = predictor is not None
        self.native = _cpu_ext.SparseFfn(
            native(gate_FD), native(up_FD), native(down_FD), silu, threshold
        )
        if predictor is not None:
            self._set_predictor(predictor, keep)

    def _set_predictor(self, predictor: Predictor, keep: Callable[[Tensor], Tensor]) -> None:
        p, kernel = predictor, self.native
        pointed_to: Sequence[Tensor] = tuple(p.tensors.values())
        if isinstance(p, MlpPredictor):
            fc1_q_RD = keep(p.fc1_q_RD)
            fc2_q_BRS = keep(by_hidden_unit(p.fc2_q_FR, kernel.block_size()))
            fc1, fc2 = (fc1_q_RD, p.fc1_scale_R, p.bias_R), (fc2_q_BRS, p.fc2_scale_F, p.bias_F)
            kernel.set_mlp_predictor(*fc1, *fc2, p.threshold)
            pointed_to = (*fc1, *fc2)
        elif isinstance(p, Int4MlpPredictor):
            fc1_SB, fc1_scale_SH = map(keep, strips(p.fc1_packed_RB, p.fc1_scale_RC))
            fc2_SB, fc2_scale_SH = map(keep, strips(p.fc2_packed_FB, p.fc2_scale_FC))
            pointed_to = (fc1_SB, fc1_scale_SH, p.bias_R, fc2_SB, fc2_scale_SH, p.bias_F)
            kernel.set_int4_mlp_predictor(*pointed_to, p.threshold)
        elif isinstance(p, GateCopy) and p.bits == 4:
            pointed_to = [keep(made) for made in strips(p.packed_FB, p.scale_FC)]
            strips_SB, scale_SH = pointed_to
            kernel.set_gate_strips_predictor(strips_SB, scale_SH, p.num_neurons, p.threshold)
        elif isinstance(p, GateCopy):
            kernel.set_gate_predictor(p.packed_FB, p.scale_FC, p.threshold)
        elif isinstance(p, SignGate):
            kernel.set_sign_predictor(p.bits_FB, p.threshold)
        else:
            raise TypeError(f"the kernels know no predictor of kind {p.kind}.")
        self._kept_alive.extend(pointed_to)

    def set_threshold(self, threshold: float) -> None:
        """The predictor's threshold from now on (a drift guard lowers it)."""
        self.native.set_predictor_threshold(threshold)

    def set_counter(self, counter_F: Tensor | None) -> None:
        """Every call adds to this int64 tensor how many of its tokens each neuron fired for."""
        self.native.set_counter(counter_F)
        self._counter = counter_F

    def forward(
        self, x_ND: Tensor, mode: Mode, out: Tensor | None = None, always_hot: int = 0
    ) -> Tensor:
        """y_ND for the normed x_ND. In predicted mode the first `always_hot` are selected."""
        if out is None:
            out = torch.empty_like(x_ND)
        self.native.forward(x_ND, mode, always_hot, out)
        return out

    def forward_selected(self, x_ND: Tensor, mask_NF: Tensor, out: Tensor | None = None) -> Tensor:
        """y_ND as in predicted mode, with the selection made elsewhere (a bool mask)."""
        if out is None:
            out = torch.empty_like(x_ND)
        self.native.forward_selected(x_ND, mask_NF, out)
        return out

    def forward_residual(
        self, x_ND: Tensor, norm_D: Tensor, eps: float, mode: Mode, always_hot: int = 0
    ) -> None:
        """x += ffn(rms_norm(x)) in one call, in place on the residual stream."""
        self.native.forward_residual(x_ND, norm_D, eps, mode, always_hot)

    @property
    def last_counts(self) -> tuple[Tensor, Tensor]:
        """(num_selected_N, num_active_N) of the last call, int64.

        Selected: gate rows read for the token (all of them but in predicted mode); active: h != 0.
        """
        selected, active = self.native.last_counts()
        return torch.tensor(selected), torch.tensor(active)

    def take_usage(self) -> FfnUsage:
        """All that `forward` did since the last time this was asked, or the FFN was made."""
        counts, *seconds = self.native.take_usage()
        return FfnUsage(tuple(FfnCounts(*row) for row in counts), *seconds)

    def activations(self, x_ND: Tensor) -> Tensor:
        """h_NF = act(gate) * up of every neuron: what the audit compares a selection with."""
        h_NF = x_ND.new_empty(x_ND.shape[0], self.num_neurons)
        self.native.activations(x_ND, h_NF)
        return h_NF

    def scores(self, x_ND: Tensor) -> Tensor:
        """score_NF of the predictor; selected is what lies above its threshold."""
        score_NF = x_ND.new_empty(x_ND.shape[0], self.num_neurons)
        self.native.scores(x_ND, score_NF)
        return score_NF

    def select(self, x_ND: Tensor, always_hot: int = 0) -> Tensor:
        """bool mask_NF: exactly the neurons whose gate rows `forward(x, 'predicted')` reads."""
        mask_NF = torch.empty(x_ND.shape[0], self.num_neurons, dtype=torch.bool)
        self.native.select(x_ND, always_hot, mask_NF)
        return mask_NF
