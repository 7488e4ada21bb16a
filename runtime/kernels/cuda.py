"""The CUDA backend: Python face of the Triton kernels of the sparse FFN and its predictors.

Everything is queued on the current stream and nothing waits for the device, so a step can be
captured in a CUDA graph: buffers are made once, masks and lists of neurons never leave the device.
Activations are fp32; weights are bf16, fp32 or records of quantized.py. At most MAX_TOKENS tokens a
call; more are a matter for dense products. With TRITON_INTERPRET=1 the same code runs on the CPU,
slowly: for tests.
Dimension key: N tokens, D model width, O outputs of a linear, F neurons, R predictor rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import triton
from torch import Tensor

from predictor import MlpPredictor, Predictor
from predictor.kinds import GateCopy, SignGate
from predictor.low_bits import GROUP
from predictor.mlp import Int4MlpPredictor

from .cuda_ffn import down_kernel, gate_up_kernel, up_kernel
from .cuda_linear import activate_kernel, linear_kernel, rms_norm_kernel, round_inputs_kernel

if TYPE_CHECKING:  # the extension may not be built
    from .quantized import Weight

Mode = Literal["dense", "exact", "predicted"]
MAX_TOKENS = 16
FEW_TOKENS = 4  # up to here products run without matrix units
BITS_OF = {torch.bfloat16: 16, torch.float32: 32}
# Records: tokens up to which that holds. On an H100 (Triton 3.6, rows of 5120) sums over several
# tiles of columns were wrong in 8 bits for 1, 2 and 4 tokens and in 4 bits for 2 and 4; in the
# interpreter they are right. The cause is not known. The matrix units' were right in both, and so
# were bf16 rows, and 4 bits for one token.
SUMS_WITHOUT_MATRIX_UNITS = {8: 0, 4: 1}
INT8, SIGNS = 7, 1  # BITS of rows whose scale stands elsewhere, and of rows of signs


@dataclass(frozen=True)
class Tile:
    """How a kernel's work is cut: neurons of a program, rows and columns of a tile, warps."""

    S: int
    R: int
    C: int
    warps: int


Tiles = tuple[Tile, Tile, Tile]  # for one token, for 2 to 4, and for more

# For one token chosen by benchmarks/bench_gpu.py tune on an H100; the others by reasoning.
EXACT_TILES = (Tile(1, 1, 4096, 4), Tile(4, 4, 512, 4), Tile(16, 16, 128, 4))
PREDICTED_TILES = (Tile(16, 4, 1024, 4), Tile(16, 4, 512, 4), Tile(32, 16, 128, 4))
UP_TILES = (Tile(16, 2, 4096, 4), Tile(16, 4, 512, 4), Tile(32, 16, 128, 4))
DOWN_TILES = (Tile(128, 16, 128, 2), Tile(256, 16, 128, 4), Tile(128, 32, 128, 4))
LINEAR_TILES = (Tile(4, 4, 1024, 4), Tile(4, 4, 512, 4), Tile(16, 16, 128, 4))


@dataclass(frozen=True)
class Rows:
    """A matrix as the kernels read it."""

    data: Tensor
    bits: int
    shape: tuple[int, int]  # rows, columns

    @classmethod
    def of(cls, weight_OD: Weight, device: torch.device) -> Rows:
        if isinstance(weight_OD, Tensor):
            if weight_OD.dtype not in BITS_OF:
                raise ValueError(f"weights must be bf16 or fp32, got {weight_OD.dtype}")
            O, D = weight_OD.shape
            data = weight_OD.to(device).contiguous()
            return cls(data, BITS_OF[weight_OD.dtype], (O, D))
        O, D = weight_OD.shape
        return cls(weight_OD.rows_OB.to(device), weight_OD.bits, (O, D))


def padded_tokens(num_tokens: int, bits: int) -> int:
    """1, 2, 4 or 16: what the kernels are compiled for."""
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"the kernels take 1 to {MAX_TOKENS} tokens, got {num_tokens}")
    if num_tokens > SUMS_WITHOUT_MATRIX_UNITS.get(bits, FEW_TOKENS):
        return MAX_TOKENS
    return next(size for size in (1, 2, FEW_TOKENS) if size >= num_tokens)


def _fitting(tiles: Tiles, N: int, D: int) -> Tile:
    """The tile for this many tokens, no wider than the matrix needs (a power of two)."""
    tile = tiles[0 if N == 1 else 1 if N <= FEW_TOKENS else 2]
    return replace(tile, C=min(tile.C, max(32, triton.next_power_of_2(D))))


def linear(
    x_ND: Tensor,
    rows: Rows,
    scale_O: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    relu: bool = False,
    out: Tensor | None = None,
    add: bool = False,
    tiles: Tiles = LINEAR_TILES,
) -> Tensor:
    """y_NO = x w^T, times a scale and plus a bias for each output, fp32; or out += it."""
    (O, D), N = rows.shape, padded_tokens(len(x_ND), rows.bits)
    if out is None:
        out = x_ND.new_empty(len(x_ND), O)
    tile = _fitting(tiles, N, D)
    linear_kernel[(triton.cdiv(O, tile.R),)](
        x_ND, rows.data, scale_O if scale_O is not None else x_ND,
        bias_O if bias_O is not None else x_ND, out, len(x_ND), O, D, N, tile.R, tile.C, rows.bits,
        scale_O is not None, bias_O is not None, relu, add, num_warps=tile.warps,
    )  # fmt: skip
    return out


def project(x_ND: Tensor, rows: Rows, add_to: Tensor | None = None) -> Tensor:
    """y_NO = x w^T for bf16 or fp32 rows and any number of tokens; or add_to += it.

    More than a few tokens are for PyTorch's products, which round x to the weights' type.
    """
    if len(x_ND) <= FEW_TOKENS:
        return linear(x_ND, rows, out=add_to, add=add_to is not None)
    y_NO = torch.nn.functional.linear(x_ND.to(rows.data.dtype), rows.data).float()
    return y_NO if add_to is None else add_to.add_(y_NO)


def rms_norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """y_ND = x / sqrt(mean(x^2) + eps) * weight, for fp32 x."""
    N, D = x_ND.shape
    out_ND = torch.empty(N, D, dtype=dtype, device=x_ND.device)
    rms_norm_kernel[(N,)](x_ND, weight_D, out_ND, eps, D, triton.next_power_of_2(D), num_warps=8)
    return out_ND


def round_inputs(x_ND: Tensor) -> Tensor:
    """What a low-bit gate is multiplied with: `predictor.low_bits.rounded_inputs`."""
    N, D = x_ND.shape
    out_ND = torch.empty_like(x_ND)
    round_inputs_kernel[(N,)](x_ND, out_ND, D, triton.next_power_of_2(D), num_warps=8)
    return out_ND


def activate(gate_NF: Tensor, up_NF: Tensor, threshold: float) -> Tensor:
    """h_NF = act(gate) * up in the dtype of the gates."""
    h_NF = torch.empty_like(gate_NF)
    size, block = gate_NF.numel(), 1024
    activate_kernel[(triton.cdiv(size, block),)](gate_NF, up_NF, h_NF, threshold, size, block)
    return h_NF


@dataclass
class DownBuffers:
    """What splits of the neurons leave for the last of them to add up; one call at a time."""

    partial: Tensor  # fp32, at least splits * N * D
    ended: Tensor  # int32, zeros

    @classmethod
    def of(cls, num_neurons: int, D: int, device: torch.device) -> DownBuffers:
        splits = max(triton.cdiv(num_neurons, tile.S) for tile in DOWN_TILES)
        return cls(
            torch.empty(splits * MAX_TOKENS * D, device=device),
            torch.zeros(triton.cdiv(D, 32), dtype=torch.int32, device=device),
        )


def up(
    x_ND: Tensor, gate_NF: Tensor, up_rows: Rows, threshold: float, out: Tensor,
    tiles: Tiles = UP_TILES,
) -> Tensor:  # fmt: skip
    """h_NF = act(gate) * up; an up row is read only where the gate fires for some token."""
    (F, D), N = up_rows.shape, padded_tokens(len(x_ND), up_rows.bits)
    tile = _fitting(tiles, N, D)
    up_kernel[(triton.cdiv(F, tile.S),)](
        x_ND, gate_NF, up_rows.data, out, threshold, len(x_ND), F, D, N, tile.S, tile.R, tile.C,
        up_rows.bits, num_warps=tile.warps,
    )  # fmt: skip
    return out


def down(
    h_NF: Tensor, down_rows: Rows, out: Tensor, buffers: DownBuffers, *, add: bool = False,
    tiles: Tiles = DOWN_TILES,
) -> Tensor:  # fmt: skip
    """y_ND = h down, or out += it; a row is read only where h != 0 for some token."""
    (F, D), N = down_rows.shape, padded_tokens(len(h_NF), down_rows.bits)
    tile = _fitting(tiles, N, D)
    down_kernel[(triton.cdiv(D, tile.C), triton.cdiv(F, tile.S))](
        h_NF, down_rows.data, out, buffers.partial, buffers.ended, len(h_NF), F, D, N,
        tile.S, tile.R, tile.C, down_rows.bits, add, num_warps=tile.warps,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Selection:
    """Neurons whose score lies above a threshold that is read on the device."""

    score_NF: Tensor  # fp32, or uint8; a token's scores stand side by side
    threshold: Tensor  # fp32, one value

    @classmethod
    def of_mask(cls, mask_NF: Tensor) -> Selection:
        """The neurons of a bool mask."""
        return cls(mask_NF.view(torch.uint8), torch.full((1,), 0.5, device=mask_NF.device))


def gate_up(
    x_ND: Tensor, gate_rows: Rows, up_rows: Rows, threshold: float, out: Tensor,
    selection: Selection | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """h_NF of the selected neurons, of all without a selection; zero elsewhere."""
    (F, D), N = gate_rows.shape, padded_tokens(len(x_ND), gate_rows.bits)
    tiles = tiles or (EXACT_TILES if selection is None else PREDICTED_TILES)
    tile = _fitting(tiles, N, D)
    if selection is None:
        scores: tuple[Tensor, int, Tensor] = x_ND, 0, x_ND
    else:
        scores = selection.score_NF, selection.score_NF.stride(0), selection.threshold
    gate_up_kernel[(triton.cdiv(F, tile.S),)](
        x_ND, gate_rows.data, up_rows.data, *scores, out, threshold, len(x_ND), F,
        D, N, tile.S, tile.R, tile.C, gate_rows.bits, selection is not None,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


class CudaSelector:
    """A predictor of any kind on the device: scores by the kernels, its threshold in memory, so
    that a captured graph sees a new one."""

    def __init__(self, predictor: Predictor, device: torch.device) -> None:
        p = self.predictor = predictor.to(device)
        self.threshold = torch.tensor([p.threshold], device=device)
        if isinstance(p, MlpPredictor):
            self._fc1 = Rows(p.fc1_q_RD, INT8, (p.rank, p.d_model))
            self._fc2 = Rows(p.fc2_q_FR, INT8, (p.num_neurons, p.rank))
        elif isinstance(p, Int4MlpPredictor):
            self._fc1 = _records(p.fc1_packed_RB, p.fc1_scale_RC, 4)
            self._fc2 = _records(p.fc2_packed_FB, p.fc2_scale_FC, 4)
        elif isinstance(p, GateCopy):
            self._gate = _records(p.packed_FB, p.scale_FC, p.bits)
        elif isinstance(p, SignGate):
            self._gate = Rows(p.bits_FB, SIGNS, (p.num_neurons, p.d_model))
        else:
            raise TypeError(f"the kernels know no predictor of kind {p.kind}.")

    @property
    def copied_rows(self) -> list[Tensor]:
        """A row for each neuron that is not the predictor's own: who moves neurons moves them."""
        if isinstance(self.predictor, GateCopy):
            return [self._gate.data]
        return [self._fc2.data] if isinstance(self.predictor, Int4MlpPredictor) else []

    def set_threshold(self, threshold: float) -> None:
        self.predictor = self.predictor.with_threshold(threshold)
        self.threshold.fill_(threshold)

    def select(self, x_ND: Tensor) -> Selection:
        return Selection(self.scores(x_ND), self.threshold)

    def mask(self, x_ND: Tensor) -> Tensor:
        """mask_NF, bool."""
        return self.scores(x_ND) > self.threshold

    def scores(self, x_ND: Tensor) -> Tensor:
        """score_NF, fp32, of any number of tokens."""
        p = self.predictor
        if len(x_ND) > MAX_TOKENS:
            return p.score(x_ND)
        if isinstance(p, MlpPredictor):
            hidden_NR = linear(x_ND, self._fc1, p.fc1_scale_R, p.bias_R, relu=True)
            return linear(hidden_NR, self._fc2, p.fc2_scale_F, p.bias_F)
        if isinstance(p, Int4MlpPredictor):
            hidden_NR = linear(round_inputs(x_ND), self._fc1, None, p.bias_R, relu=True)
            return linear(round_inputs(hidden_NR), self._fc2, None, p.bias_F)
        if isinstance(p, GateCopy):
            return linear(round_inputs(x_ND), self._gate)
        return linear(torch.where(x_ND > 0, 1.0, -1.0), self._gate)


def _records(packed_OB: Tensor, scale_OC: Tensor, bits: int) -> Rows:
    """Weights of predictor.low_bits as records of quantized.py: in 4 bits a value there is
    scale * q + least, here least is -8 scale."""
    halves_OC = scale_OC if bits == 8 else torch.cat((scale_OC, scale_OC * -8), dim=1)
    numbers_OB = packed_OB.view(torch.uint8)
    records_OB = torch.cat((numbers_OB, halves_OC.contiguous().view(torch.uint8)), dim=1)
    O, C = scale_OC.shape
    return Rows(records_OB.contiguous(), bits, (O, C * GROUP))


@dataclass
class CudaFfn:
    """One layer's FFN: `forward` of 1 to 16 tokens in mode exact or predicted.

    `buffers` may be shared by layers that run one after the other.
    """

    gate: Rows
    up: Rows
    down: Rows
    threshold: float
    selector: CudaSelector | None
    buffers: DownBuffers

    @classmethod
    def of(
        cls,
        gate_FD: Weight,
        up_FD: Weight,
        down_FD: Weight,
        threshold: float,
        predictor: Predictor | None,
        device: torch.device,
        buffers: DownBuffers | None = None,
    ) -> CudaFfn:
        gate, up_rows, down_rows = (Rows.of(w, device) for w in (gate_FD, up_FD, down_FD))
        return cls(
            gate, up_rows, down_rows, threshold,
            None if predictor is None else CudaSelector(predictor, device),
            buffers or DownBuffers.of(*gate.shape, device),
        )  # fmt: skip

    def activations(self, x_ND: Tensor, mode: Mode, selection: Selection | None = None) -> Tensor:
        """h_NF; in mode predicted zero where the selection, the predictor's if none is given, lets
        nothing through."""
        h_NF = x_ND.new_empty(len(x_ND), self.gate.shape[0])
        if mode == "predicted" and selection is None:
            assert self.selector is not None, "the model checks modes before it comes here"
            selection = self.selector.select(x_ND)
        return gate_up(x_ND, self.gate, self.up, self.threshold, h_NF, selection)

    def forward(self, x_ND: Tensor, mode: Mode, selection: Selection | None = None) -> Tensor:
        """y_ND for the normed x_ND."""
        h_NF = self.activations(x_ND, mode, selection)
        return down(h_NF, self.down, torch.empty_like(x_ND), self.buffers)

    def add_to(self, residual_ND: Tensor, x_ND: Tensor, mode: Mode) -> None:
        """residual += y."""
        down(self.activations(x_ND, mode), self.down, residual_ND, self.buffers, add=True)
