"""Up and down of a neuron side by side in memory: where weights lie changes no bit of a result, and
what is not needed is not read."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from predictor import MlpPredictor
from runtime.ffn import SparseFFN
from runtime.model import Model

cpu = pytest.importorskip("runtime.kernels.cpu", reason="the C++ extension is not built")
pytestmark = pytest.mark.usefixtures("one_thread")
quantized = pytest.importorskip("runtime.kernels.quantized")
QuantizedMatrix, side_by_side = quantized.QuantizedMatrix, quantized.side_by_side

MODES = ("dense", "exact", "predicted")
FORMATS: tuple[torch.dtype | int, ...] = (torch.float32, torch.bfloat16, 8, 4)
# Widths with and without rest, rows of 4 bits that are read one by one, more than one block.
SHAPES = [(1, 32), (63, 96), (130, 576), (70, 2080)]  # F, D
THRESHOLD = 0.3


def matrices(F: int, D: int, form: torch.dtype | int) -> list["quantized.Weight"]:
    """gate, up and down."""
    weights = [torch.randn(F, D) / D**0.5 for _ in range(3)]
    if isinstance(form, int):
        return [QuantizedMatrix.of(weight_FD, form) for weight_FD in weights]
    return [weight_FD.to(form) for weight_FD in weights]


def predictor_for(F: int, D: int) -> MlpPredictor:
    return MlpPredictor.from_float(
        torch.randn(10, D) / D**0.5, torch.randn(10) / 4, torch.randn(F, 10) / 3, torch.randn(F) / 4
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("N", [1, 3, 12, 17])
@pytest.mark.parametrize(("F", "D"), SHAPES)
def test_results_are_those_of_separate_matrices(
    isa: str, form: torch.dtype | int, N: int, F: int, D: int
) -> None:
    gate, up, down = matrices(F, D, form)
    predictor, x_ND = predictor_for(F, D), torch.randn(N, D)
    apart = cpu.CpuFfn(gate, up, down, THRESHOLD, predictor)
    beside = cpu.CpuFfn(gate, *side_by_side(up, down), THRESHOLD, predictor)
    for mode in MODES:
        expected_ND = apart.forward(x_ND, mode)
        assert torch.equal(beside.forward(x_ND, mode), expected_ND), mode
        for num_threads in (2, 3):
            cpu.set_num_threads(num_threads)
            assert torch.equal(beside.forward(x_ND, mode), expected_ND), (mode, num_threads)
        cpu.set_num_threads(1)
    assert torch.equal(beside.activations(x_ND), apart.activations(x_ND))


def test_odd_widths(isa: str) -> None:
    gate, up, down = matrices(150, 577, torch.bfloat16)
    x_ND = torch.randn(2, 577)
    beside = cpu.CpuFfn(gate, *side_by_side(up, down), THRESHOLD)
    apart = cpu.CpuFfn(gate, up, down, THRESHOLD)
    for mode in ("dense", "exact"):
        assert torch.equal(beside.forward(x_ND, mode), apart.forward(x_ND, mode))


def test_silu(isa: str) -> None:
    gate, up, down = matrices(150, 96, torch.bfloat16)
    x_ND = torch.randn(2, 96)
    beside = cpu.CpuFfn(gate, *side_by_side(up, down), silu=True)
    apart = cpu.CpuFfn(gate, up, down, silu=True)
    assert torch.equal(beside.forward(x_ND, "dense"), apart.forward(x_ND, "dense"))


@pytest.mark.parametrize("form", [torch.bfloat16, 8, 4])
def test_rows_that_no_token_needs_are_not_read(isa: str, form: torch.dtype | int) -> None:
    F, D = 150, 96
    gate, *up_and_down = matrices(F, D, form)
    x_ND = torch.randn(2, D)
    up, down = side_by_side(*up_and_down)
    ffn = cpu.CpuFfn(gate, up, down, 0.5)
    expected_ND, unused_F = ffn.forward(x_ND, "exact"), ~(ffn.activations(x_ND) != 0).any(0)
    assert 0 < unused_F.sum() < F
    for matrix in (up, down):  # in the memory that the kernel reads
        if isinstance(matrix, Tensor):
            matrix[unused_F] = torch.nan
        else:
            matrix.rows_OB[unused_F] = 0xFF  # fp16 scales that are NaN
    assert torch.equal(ffn.forward(x_ND, "exact"), expected_ND)
    # These widen fp16 by shifts, in which a NaN is a large number: it shows in no result of theirs.
    if isinstance(up, Tensor) or isa not in ("avx2", "generic"):
        assert bool(ffn.forward(x_ND, "dense").isnan().all()), "dense reads every row"


@pytest.mark.parametrize("form", FORMATS)
def test_parts_of_them(form: torch.dtype | int) -> None:
    """Cold neurons are a slice of all; a slice stays where it is."""
    gate, *up_and_down = matrices(90, 96, form)
    up, down = side_by_side(*up_and_down)
    x_ND = torch.randn(1, 96)
    cold = [matrix[40:] for matrix in (gate, up, down)]
    apart = [matrix[torch.arange(40, 90)] for matrix in (gate, *up_and_down)]
    result = cpu.CpuFfn(*cold, THRESHOLD).forward(x_ND, "exact")
    assert torch.equal(result, cpu.CpuFfn(*apart, THRESHOLD).forward(x_ND, "exact"))


def address(weight: "quantized.Weight") -> int:
    rows = weight if isinstance(weight, Tensor) else weight.rows_OB
    assert isinstance(rows, Tensor)
    return rows.data_ptr()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_is_loaded_so(tiny_model_dir: Path, bits: int | None) -> None:
    model = Model.from_folder(tiny_model_dir, kernels="cpu", weight_bits=bits)  # type: ignore[arg-type]
    for layer in model.layers:
        assert isinstance(layer.ffn, SparseFFN)
        ffn = layer.ffn.weights
        row_bytes = ffn.up_FD.nbytes // len(ffn.up_FD)
        assert address(ffn.down_FD) - address(ffn.up_FD) == row_bytes
        assert address(ffn.up_FD[1:]) - address(ffn.up_FD) == 2 * row_bytes


def test_rows_that_overlap_are_refused() -> None:
    gate, up, down = matrices(20, 96, torch.float32)
    assert isinstance(up, Tensor)
    overlapping = up.as_strided((10, 96), (95, 1))
    with pytest.raises(ValueError, match="up_FD must be rows that do not overlap"):
        cpu.CpuFfn(gate[:10], overlapping, down[:10])
