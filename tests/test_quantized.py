"""Weights in 8 and 4 bits: how they are rounded, and that kernels compute exactly what they say.

What the kernels have to compute is defined on the dequantised weights in fp64, with vectors rounded
to int8 groups wherever they meet whole numbers (gate and up, not down).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from predictor.kinds import GateCopy
from predictor.low_bits import rounded_inputs
from runtime.errors import InvalidConfig
from runtime.model import Model

cpu = pytest.importorskip("runtime.kernels.cpu", reason="the C++ extension is not built")
pytestmark = pytest.mark.usefixtures("one_thread")
quantized = pytest.importorskip("runtime.kernels.quantized")
QuantizedMatrix = quantized.QuantizedMatrix

UNIT_ROUNDOFF = 2.0**-24
HALF_ROUNDOFF = 2.0**-11
GROUP = 32
BITS = (8, 4)
LARGEST_HALF = (0xFF, 0x7B)  # 65504 as bytes


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def poison(matrix: QuantizedMatrix, rows_O: Tensor) -> None:
    """Scales of these rows become as large as can be: whoever reads them shows it."""
    num_groups = matrix.shape[1] // GROUP
    first = matrix.shape[1] * matrix.bits // 8
    scales = matrix.rows_OB[:, first : first + 2 * num_groups].view(len(matrix), num_groups, 2)
    scales[rows_O] = torch.tensor(LARGEST_HALF, dtype=torch.uint8)


# -- rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_miss_by_half_a_step(dtype: torch.dtype) -> None:
    weight_OD = normal(37, 96).to(dtype)
    weight_OD[3] *= 1e4
    weight_OD[4] *= 1e-4
    weight_OD[5, :GROUP] = 0
    restored_OD = QuantizedMatrix.of(weight_OD, 8).float()
    groups = weight_OD.float().view(37, -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 127
    # half a step, the step's own rounding to fp16 up to 127 times, and fp16's smallest step
    bound = 0.5 * step * (1 + HALF_ROUNDOFF) + 127 * (HALF_ROUNDOFF * step + 2.0**-25)
    assert bool(((restored_OD.view_as(groups) - groups).abs() <= bound).all())
    assert not bool(restored_OD[5, :GROUP].any())


def test_4_bits_are_no_worse_than_the_whole_range_in_fifteen_steps() -> None:
    weight_OD = normal(200, 128)
    groups = weight_OD.view(200, -1, GROUP)
    least = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).half().float()
    plain = least + step * ((groups - least) / step).round().clamp(0, 15)
    plain_error = (plain - groups).square().sum(-1)
    restored = QuantizedMatrix.of(weight_OD, 4).float().view_as(groups)
    error = (restored - groups).square().sum(-1)
    assert bool((error <= plain_error * (1 + 1e-5)).all())
    assert float(error.sum()) < 0.9 * float(plain_error.sum()), "the search finds better grids"


def test_a_4_bit_grid_comes_back_as_it_was() -> None:
    """Weights that were rounded once, as those of a GGUF in Q4_1, lose nothing again."""
    q = torch.randint(0, 16, (50, 4, GROUP)).float()
    q[..., 0], q[..., 1] = 0, 15
    scale = (torch.rand(50, 4, 1) / 8).half().float()
    least = (torch.randn(50, 4, 1) / 4).half().float()
    weight_OD = (scale * q + least).flatten(1)
    restored_OD = QuantizedMatrix.of(weight_OD, 4).float()
    # the range's ends are known to an fp32 step, so the scale may be an fp16 step away
    assert float((restored_OD - weight_OD).abs().max()) <= 15 * HALF_ROUNDOFF * float(scale.max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_weight_that_has_no_place_is_refused(bits: int, bad: float) -> None:
    weight_OD = normal(5, 64)
    weight_OD[4, 33] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        QuantizedMatrix.of(weight_OD, bits)


@pytest.mark.parametrize("bits", BITS)
def test_parts_of_a_matrix_are_its_rows(bits: int) -> None:
    matrix = QuantizedMatrix.of(normal(20, 64), bits)
    whole = matrix.float()
    assert torch.equal(matrix[5:9].float(), whole[5:9])
    index = torch.tensor([7, 0, 7])
    assert torch.equal(matrix[index].float(), whole[index])
    assert torch.equal(matrix.dequantize(torch.bfloat16), whole.bfloat16())
    assert matrix.nbytes == 20 * 64 // 32 * {8: 34, 4: 20}[bits]


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("N", [1, 2, 5, 17])
@pytest.mark.parametrize(("O", "D"), [(1, 32), (3, 96), (101, 576), (70, 1056)])
def test_linear_is_the_product_of_rounded_sides(
    isa: str, bits: int, N: int, O: int, D: int
) -> None:
    matrix, x_ND = QuantizedMatrix.of(normal(O, D), bits), torch.randn(N, D)
    x_ND[-1, ::2] *= 1e3
    result = cpu.linear(x_ND, matrix, out=torch.full((N, O), torch.nan))
    x, w = rounded_inputs(x_ND).double(), matrix.float().double()
    # scales' product, the sum over groups in lanes, and of 4 bits what groups have at least
    terms = 8 + 2 * (D / GROUP) ** 0.5
    size = x.abs() @ w.abs().T
    if bits == 4:
        least = w.view(O, -1, GROUP).amin(-1).abs()
        size += x.abs().view(N, -1, GROUP).sum(-1) @ (2 * least.T)
    assert bool(((result - x @ w.T).abs() <= UNIT_ROUNDOFF * terms * size).all())


@pytest.mark.parametrize("bits", BITS)
def test_linear_depends_on_neither_batch_mates_nor_threads(isa: str, bits: int) -> None:
    matrix, x_ND = QuantizedMatrix.of(normal(203, 576), bits), torch.randn(17, 576)
    alone = torch.cat([cpu.linear(x_D[None], matrix) for x_D in x_ND])
    for num_threads in (1, 2, 3):
        cpu.set_num_threads(num_threads)
        assert torch.equal(cpu.linear(x_ND, matrix), alone)
        assert torch.equal(cpu.linear(x_ND[3:8].contiguous(), matrix), alone[3:8])


@pytest.mark.parametrize("bits", BITS)
def test_largest_products_add_up_exactly(isa: str, bits: int) -> None:
    """127 * 127 and 15 * 127 in all places of a group, of either sign."""
    D = 96
    weight_OD = torch.ones(3, D) * torch.tensor([[1.0], [-1.0], [1.0]])
    weight_OD[2, ::2] = -1
    matrix = QuantizedMatrix.of(127 * weight_OD, bits)
    x_ND = torch.full((2, D), 127.0)
    x_ND[1, ::2] = -127
    expected_NO = x_ND.double() @ matrix.float().double().T
    assert torch.equal(cpu.linear(x_ND, matrix).double(), expected_NO)


# -- the FFN ---------------------------------------------------------------------------------------


class Layer:
    def __init__(self, F: int, D: int, bits: int, threshold: float = 0.3) -> None:
        self.gate_FD, self.up_FD, self.down_FD = (
            QuantizedMatrix.of(normal(F, D), bits) for _ in range(3)
        )
        self.threshold = threshold

    def ffn(self) -> "cpu.CpuFfn":
        return cpu.CpuFfn(self.gate_FD, self.up_FD, self.down_FD, self.threshold)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("N", [1, 5, 19])
@pytest.mark.parametrize(("F", "D"), [(1, 32), (63, 64), (201, 576), (90, 4192), (4200, 96)])
def test_ffn_is_its_definition_and_exact_is_dense(
    isa: str, bits: int, N: int, F: int, D: int
) -> None:
    layer, x_ND = Layer(F, D, bits), torch.randn(N, D)
    ffn = layer.ffn()
    dense_ND = ffn.forward(x_ND, "dense", out=torch.full((N, D), torch.nan))
    assert torch.equal(ffn.forward(x_ND, "exact", out=torch.full((N, D), torch.nan)), dense_ND)
    x = rounded_inputs(x_ND).double()
    gate, up = (x @ m.float().double().T for m in (layer.gate_FD, layer.up_FD))
    h_NF = torch.where(gate > layer.threshold, gate, 0.0) * up
    down = layer.down_FD.float().double()
    error = (dense_ND - h_NF @ down).abs()
    h_error = 64 * UNIT_ROUNDOFF * (1 + gate.abs()) * (1 + up.abs())  # both products' rounding
    edge = (gate - layer.threshold).abs() < 1e-5
    bound = (h_error + edge * (gate * up).abs()) @ down.abs()
    bound += 4 * UNIT_ROUNDOFF * F**0.5 * (h_NF.abs() @ down.abs().clamp(min=1.0))
    assert bool((error <= bound).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-25, 1e17, torch.inf])
def test_activations_far_from_one(isa: str, bits: int, size: float) -> None:
    layer, x_ND = Layer(70, 64, bits, threshold=0.0), torch.randn(3, 64)
    x_ND[1] *= size
    ffn = layer.ffn()
    y_ND = ffn.forward(x_ND, "dense")
    assert torch.equal(ffn.forward(x_ND, "exact").nan_to_num(), y_ND.nan_to_num())
    assert bool(y_ND[[0, 2]].isfinite().all())
    if size == torch.inf:
        assert not bool(y_ND[1].isfinite().any())
        return
    x_D = rounded_inputs(x_ND[1:2]).double()
    gate, up = (x_D @ m.float().double().T for m in (layer.gate_FD, layer.up_FD))
    expected_ND = (gate.clamp(min=0) * up) @ layer.down_FD.float().double()
    tiny = 1e-27  # below what floats hold, or what is worth a step
    assert torch.allclose(y_ND[1:2].double(), expected_ND, rtol=1e-3, atol=1e-3 * size**2 + tiny)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("N", [1, 3, 12])
def test_exact_mode_reads_no_row_that_no_token_needs(isa: str, bits: int, N: int) -> None:
    layer, x_ND = Layer(150, 64, bits, threshold=1.5), torch.randn(N, 64)
    ffn = layer.ffn()
    expected = ffn.forward(x_ND, "exact")
    unused_F = ~(ffn.activations(x_ND) != 0).any(0)
    assert 0 < unused_F.sum() < 150
    poison(layer.up_FD, unused_F)
    poison(layer.down_FD, unused_F)
    assert torch.equal(ffn.forward(x_ND, "exact"), expected)
    poison(layer.up_FD, ~unused_F)
    assert bool((ffn.forward(x_ND, "exact").abs().amax(1) > 1e3).all()), "others are read"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("N", [9, 19])
@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_ffn_depends_on_neither_batch_mates_nor_threads(
    isa: str, bits: int, N: int, mode: str
) -> None:
    layer, x_ND = Layer(201, 576, bits), torch.randn(N, 576)
    ffn = cpu.CpuFfn(
        layer.gate_FD,
        layer.up_FD,
        layer.down_FD,
        layer.threshold,
        GateCopy.of(layer.gate_FD.float(), 4, layer.threshold),
    )
    alone = [(ffn.forward(x_D[None], mode), *ffn.last_counts) for x_D in x_ND]
    selected_N = torch.cat([selected for _, selected, _ in alone])
    if mode == "predicted":
        assert not torch.equal(alone[0][0], ffn.forward(x_ND[:1], "exact")), "some are missed"
    for num_threads in (1, 3):
        cpu.set_num_threads(num_threads)
        assert torch.equal(ffn.forward(x_ND, mode), torch.cat([y_ND for y_ND, _, _ in alone]))
        assert torch.equal(ffn.last_counts[0], selected_N)


@pytest.mark.skipif("amx" not in cpu.available_isas(), reason="this CPU has no AMX")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [32, 480, 512, 544, 640, 1056, 16416])
def test_tiles_give_the_bits_of_vectors(bits: int, D: int) -> None:
    """Of rows up to 16384 columns; wider ones take no tiles."""
    matrix, x_ND = QuantizedMatrix.of(normal(37, D), bits), torch.randn(33, D)
    results = []
    for isa in ("amx", "avx512vnni"):
        cpu.force_isa(isa)
        results.append([cpu.linear(x_ND[:N], matrix) for N in (9, 10, 16, 17, 33)])
    cpu.force_isa(None)
    assert all(torch.equal(tiles, vectors) for tiles, vectors in zip(*results, strict=True))


@pytest.mark.parametrize("kept", ["bf16", 8, 4])
def test_silu_is_torch_s_and_runs_dense_only(isa: str, kept: str | int) -> None:
    weights = [normal(201, 64).bfloat16() for _ in range(3)]
    if kept != "bf16":
        weights = [QuantizedMatrix.of(weight, kept) for weight in weights]
    ffn = cpu.CpuFfn(*weights, silu=True)
    x_ND = torch.randn(3, 64) * torch.tensor([[1.0], [30.0], [1e-3]])
    x = (x_ND if kept == "bf16" else rounded_inputs(x_ND)).double()
    gate, up = (x @ weight.float().double().T for weight in weights[:2])
    h_NF = torch.nn.functional.silu(gate) * up
    h_bound = 64 * UNIT_ROUNDOFF * (1 + gate.abs()) * (1 + up.abs())
    assert bool(((ffn.activations(x_ND) - h_NF).abs() <= h_bound).all())
    down = weights[2].float().double()
    bound = h_bound @ down.abs() + 201**0.5 * UNIT_ROUNDOFF * (h_NF.abs() @ down.abs())
    assert bool(((ffn.forward(x_ND, "dense") - h_NF @ down).abs() <= 2 * bound).all())
    with pytest.raises(ValueError, match="SiLU is never zero"):
        ffn.forward(x_ND, "exact")


def test_wrong_arguments_are_refused() -> None:
    good, other = QuantizedMatrix.of(normal(20, 64), 8), QuantizedMatrix.of(normal(20, 64), 4)
    refused = [
        (r"groups of 32", lambda: QuantizedMatrix.of(normal(4, 40), 8)),
        (r"8 or 4 bits", lambda: QuantizedMatrix.of(normal(4, 32), 2)),
        (r"rows_OB must be of shape", lambda: QuantizedMatrix(good.rows_OB, 4, 64)),
        (r"rows_OB must be uint8", lambda: QuantizedMatrix(good.rows_OB.view(torch.int8), 8, 64)),
        (r"w_OD must be float32 or bfloat16", lambda: QuantizedMatrix.of(normal(4, 32).half(), 8)),
        (r"of one dtype|one dtype", lambda: cpu.CpuFfn(good, good, other)),
        (r"up_FD has another shape", lambda: cpu.CpuFfn(good, good[:7], good)),
        (r"x_ND must be of shape", lambda: cpu.linear(torch.randn(1, 32), good)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


# -- the model -------------------------------------------------------------------------------------


def nearness(model: Model, other: Model, ids_N: Tensor) -> float:
    """Mean KL of decode steps, in nats."""
    steps = []
    for m in (model, other):
        cache = m.new_cache(len(ids_N))
        m.prefill(ids_N[:2], cache)
        steps.append(torch.cat([m.decode(ids_N[n : n + 1], [cache]) for n in range(2, len(ids_N))]))
    ours, theirs = (logits.log_softmax(-1) for logits in steps)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("hidden_act", ["relu", "silu"])
def test_models_in_fewer_bits_stay_near(
    make_tiny_model: Callable[..., Path], hidden_act: str
) -> None:
    folder = make_tiny_model(hidden_act=hidden_act)
    ids_N = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5))
    whole = Model.from_folder(folder, kernels="cpu", dtype="float32")
    by_bits = {
        bits: nearness(Model.from_folder(folder, kernels="cpu", weight_bits=bits), whole, ids_N)
        for bits in BITS
    }
    assert 0 < by_bits[8] < 0.01
    assert by_bits[8] < by_bits[4] < 0.5


@pytest.mark.parametrize("bits", BITS)
def test_modes_and_batches_of_a_quantised_model_agree(
    make_tiny_model: Callable[..., Path], bits: int
) -> None:
    model = Model.from_folder(make_tiny_model(), kernels="cpu", weight_bits=bits)
    prompts = [torch.randint(0, 256, (length,)) for length in (3, 50)]  # read directly, and not
    alone = []
    for prompt in prompts:
        caches = [model.new_cache(60) for _ in range(2)]
        for cache in caches:
            model.prefill(prompt, cache)
        dense, exact = (
            model.decode([7], [cache], mode)
            for cache, mode in zip(caches, ("dense", "exact"), strict=True)
        )
        assert torch.equal(dense, exact)
        alone.append(exact[0])
    caches = [model.new_cache(60) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.prefill(prompt, cache)
    assert torch.equal(model.decode([7, 7], caches, "exact"), torch.stack(alone))


def test_where_fewer_bits_do_not_run_is_said(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    with pytest.raises(InvalidConfig, match=r"C\+\+ kernels on the host only"):
        Model.from_folder(folder, kernels="torch", weight_bits=8)
    odd = make_tiny_model(hidden_size=48, num_attention_heads=4)
    with pytest.raises(InvalidConfig, match=r"groups of 32.*--weights bf16"):
        Model.from_folder(odd, kernels="cpu", weight_bits=4)
