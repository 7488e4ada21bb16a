"""The Triton kernels: parity by error ratio, what they do not read, and that runs repeat.

Without a GPU they run in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET); with one
the same tests run on it. A result may miss the fp64 truth by twice what PyTorch's own products in
the weights' type miss it by, and a rounding error of fp32.
"""

import os

import pytest
import torch
from torch import Tensor

from predictor import MlpPredictor, Predictor
from predictor.kinds import GateCopy, SignGate
from predictor.low_bits import rounded_inputs
from predictor.mlp import Int4MlpPredictor
from runtime.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")
from runtime.kernels import cuda
from runtime.kernels.cuda_decode import AttentionBuffers, CudaAttention, KvBatch

SHAPES = [(1, 32), (37, 48), (150, 96)]  # F, D
BATCHES = [1, 2, 4, 5, 16]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["mlp", "mlp-int4", "gate-int8", "gate-int4", "sign"]
# The interpreter cuts what it turns into bf16 instead of rounding it.
TWO_PARTS = 2.0**-14  # of x when it is split into two bf16 values, relative
FP32 = 2.0**-20


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if is_interpreted != (request.param == "interpreter"):
        pytest.skip("kernels are interpreted or compiled, for a whole process")
    return torch.device("cpu" if is_interpreted else "cuda")


class Layer:
    """Random weights, vectors, and a threshold in a wide gap between the gates: rounding does not
    decide who fires."""

    def __init__(
        self, device: torch.device, F: int, D: int, N: int,
        dtype: torch.dtype = torch.bfloat16, share: float = 0.3,
    ) -> None:  # fmt: skip
        self.device = device
        self.weights = tuple((torch.randn(F, D) / D**0.5).to(dtype).to(device) for _ in range(3))
        self.x_ND = torch.randn(N, D).to(device)
        gate = (self.x_ND.double() @ self.weights[0].double().T).flatten().sort().values.cpu()
        near = gate[int((1 - share) * len(gate)) - 2 :][:10].clamp(min=0.05).unique()
        widest = int(near.diff().argmax()) if len(near) > 1 else 0
        self.threshold = float(near[widest : widest + 2].mean()) if len(near) > 1 else 0.01

    def ffn(self, predictor: Predictor | None = None) -> cuda.CudaFfn:
        return cuda.CudaFfn.of(*self.weights, self.threshold, predictor, self.device)

    def h(self, float_type: torch.dtype, mask_NF: Tensor | None = None) -> Tensor:
        """act(gate) * up by products in this type; who fires is decided in fp64."""
        gate_FD, up_FD, _ = self.weights
        fires_NF = self.x_ND.double() @ gate_FD.double().T > self.threshold
        if mask_NF is not None:
            fires_NF &= mask_NF
        x_ND = self.x_ND.to(float_type)
        gate_NF, up_NF = x_ND @ gate_FD.to(float_type).T, x_ND @ up_FD.to(float_type).T
        return torch.where(fires_NF, gate_NF * up_NF, 0.0)

    def y(self, float_type: torch.dtype, mask_NF: Tensor | None = None) -> Tensor:
        return self.h(float_type, mask_NF) @ self.weights[2].to(float_type)

    def check(self, result: Tensor, mask_NF: Tensor | None = None) -> None:
        plain = self.y(self.weights[0].dtype, mask_NF)
        assert_close(result, plain, self.y(torch.float64, mask_NF))


def assert_close(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    error = (result.double() - truth).abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + FP32 * (1 + truth.abs().max())
    assert bool(error <= allowed), f"error {error:.3e}, allowed {allowed:.3e}"


def make_predictor(kind: str, layer: Layer, R: int = 10) -> Predictor:
    gate_FD = layer.weights[0].cpu()
    F, D = gate_FD.shape
    if kind == "sign":
        return SignGate.of(gate_FD).with_threshold(1)
    if kind.startswith("gate"):
        return GateCopy.of(gate_FD, int(kind.removeprefix("gate-int")), 0.2)
    mlp = MlpPredictor.from_float(
        torch.randn(R, D) / D**0.5, torch.randn(R) / 4, torch.randn(F, R) / R**0.5,
        torch.randn(F) / 4, 0.1,
    )  # fmt: skip
    return Int4MlpPredictor.of(mlp) if kind == "mlp-int4" else mlp


def chosen_predictor(chosen_F: Tensor, D: int) -> MlpPredictor:
    """Selects the same neurons for every token."""
    return MlpPredictor.from_float(
        torch.zeros(3, D), torch.zeros(3), torch.zeros(len(chosen_F), 3),
        torch.where(chosen_F, 1.0, -1.0), 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize(("F", "D"), SHAPES)
def test_exact_matches_the_reference(
    device: torch.device, F: int, D: int, N: int, dtype: torch.dtype
) -> None:
    layer = Layer(device, F, D, N, dtype)
    layer.check(layer.ffn().forward(layer.x_ND, "exact"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 3])
def test_predicted_matches_the_reference(device: torch.device, N: int, kind: str) -> None:
    layer = Layer(device, 150, 96, N)
    predictor = make_predictor(kind, layer)
    ffn = layer.ffn(predictor)
    assert ffn.selector is not None
    score_NF, expected_NF = ffn.selector.scores(layer.x_ND).cpu(), predictor.score(layer.x_ND.cpu())
    torch.testing.assert_close(score_NF, expected_NF, rtol=TWO_PARTS, atol=TWO_PARTS)
    mask_NF = score_NF > predictor.threshold
    assert 0 < int(mask_NF.sum()) < mask_NF.numel()
    layer.check(ffn.forward(layer.x_ND, "predicted"), mask_NF.to(device))


@pytest.mark.parametrize("N", [1, 3])
def test_a_mask_selects_too(device: torch.device, N: int) -> None:
    """Part of a wider mask, as the hot neurons' is."""
    layer = Layer(device, 150, 96, N)
    mask_NF = (torch.rand(N, 200) < 0.4).to(device)[:, :150]
    result_ND = layer.ffn().forward(layer.x_ND, "predicted", cuda.Selection.of_mask(mask_NF))
    layer.check(result_ND, mask_NF)


def test_a_new_threshold_counts_from_the_next_call(device: torch.device) -> None:
    layer = Layer(device, 150, 96, 1)
    ffn = layer.ffn(make_predictor("mlp", layer))
    assert ffn.selector is not None
    ffn.selector.set_threshold(1e9)
    assert not ffn.forward(layer.x_ND, "predicted").any()
    ffn.selector.set_threshold(-1e9)
    layer.check(ffn.forward(layer.x_ND, "predicted"))


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("N", [1, 3])
def test_rows_that_are_not_needed_are_never_read(device: torch.device, N: int, mode: str) -> None:
    layer = Layer(device, 150, 96, N)
    chosen_F = torch.rand(150) < 0.5
    mask_NF = chosen_F.to(device).expand(N, -1) if mode == "predicted" else None
    ffn = layer.ffn(chosen_predictor(chosen_F, 96))
    clean_ND = ffn.forward(layer.x_ND, mode)
    gate, up, down = (rows.data for rows in (ffn.gate, ffn.up, ffn.down))
    silent_F = ~(layer.h(torch.float64, mask_NF) != 0).any(0)
    assert 0 < int(silent_F.sum()) < 150
    up[silent_F], down[silent_F] = torch.nan, torch.nan
    if mode == "predicted":
        gate[~chosen_F.to(device)] = torch.nan
    assert torch.equal(ffn.forward(layer.x_ND, mode), clean_ND)


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 150])
def test_none_one_and_all_active(device: torch.device, count: int, N: int) -> None:
    layer = Layer(device, 150, 96, N)
    gate_NF = layer.x_ND.double() @ layer.weights[0].double().T
    top = gate_NF.amax(0).sort(descending=True).values.tolist()
    layer.threshold = {0: top[0] + 1, 1: (top[0] + top[1]) / 2, 150: float(gate_NF.min()) - 1}[
        count
    ]
    assert int((layer.h(torch.float64) != 0).any(0).sum()) == count
    layer.check(layer.ffn().forward(layer.x_ND, "exact"))


@pytest.mark.parametrize("N", [1, 4])
def test_runs_repeat_bit_for_bit_and_leave_no_trace(device: torch.device, N: int) -> None:
    layer = Layer(device, 150, 96, N)
    ffn = layer.ffn(make_predictor("mlp", layer))
    for mode in ("exact", "predicted"):
        first_ND = ffn.forward(layer.x_ND, mode)
        for _ in range(1 if device.type == "cpu" else 50):
            ffn.buffers.partial.fill_(torch.nan)
            assert torch.equal(ffn.forward(layer.x_ND, mode), first_ND)
            assert not ffn.buffers.ended.any()


def test_a_token_is_the_same_among_others(device: torch.device) -> None:
    layer = Layer(device, 150, 96, 4)
    layer.x_ND[2] = torch.nan  # a broken neighbour
    ffn = layer.ffn()
    together_ND = ffn.forward(layer.x_ND, "exact")
    for n in (0, 1, 3):
        alone_ND = ffn.forward(layer.x_ND[n : n + 1].contiguous(), "exact")
        torch.testing.assert_close(
            together_ND[n : n + 1], alone_ND, rtol=TWO_PARTS, atol=8 * TWO_PARTS
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3])
def test_up_and_down_alone(device: torch.device, N: int, dtype: torch.dtype) -> None:
    """The two exact operators: gates before their activation come from a dense product."""
    layer = Layer(device, 150, 96, N, dtype)
    ffn = layer.ffn()
    gate_NF = layer.x_ND @ layer.weights[0].float().T
    h_NF = torch.full_like(gate_NF, torch.nan)
    cuda.up(layer.x_ND, gate_NF, ffn.up, layer.threshold, h_NF)
    assert_close(h_NF, layer.h(dtype), layer.h(torch.float64))
    residual_ND = torch.randn_like(layer.x_ND)
    sum_ND = cuda.down(h_NF, ffn.down, residual_ND.clone(), ffn.buffers, add=True)
    layer.check(sum_ND - residual_ND)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("N", [1, 3, 5])
def test_weights_in_8_and_4_bits(device: torch.device, N: int, bits: int) -> None:
    quantized = pytest.importorskip(
        "runtime.kernels.quantized", reason="the C++ extension is not built"
    )
    layer = Layer(device, 150, 96, N, torch.float32)
    rounded = [quantized.QuantizedMatrix.of(w.cpu(), bits) for w in layer.weights]
    layer.weights = tuple(matrix.float().to(device) for matrix in rounded)
    ffn = cuda.CudaFfn.of(*rounded, layer.threshold, None, device)
    result_ND = ffn.forward(layer.x_ND, "exact")
    assert_close(result_ND, layer.y(torch.bfloat16), layer.y(torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("N", [1, 2, 4, 16])
def test_rows_as_wide_as_a_real_model_s(N: int, bits: int) -> None:
    """In several tiles of columns, with the tiles that are served."""
    quantized = pytest.importorskip(
        "runtime.kernels.quantized", reason="the C++ extension is not built"
    )
    device = torch.device("cuda")
    layer = Layer(device, 700, 5120, N, torch.bfloat16 if bits == 16 else torch.float32)
    stored = layer.weights
    if bits < 16:
        stored = [quantized.QuantizedMatrix.of(w.cpu(), bits) for w in layer.weights]
        layer.weights = tuple(matrix.float().to(device) for matrix in stored)
    ffn = cuda.CudaFfn.of(*stored, layer.threshold, None, device)
    plain_ND, true_ND = layer.y(torch.bfloat16), layer.y(torch.float64)
    assert_close(ffn.forward(layer.x_ND, "exact"), plain_ND, true_ND)
    up_FD = layer.weights[1]
    plain_NF = layer.x_ND.bfloat16() @ up_FD.bfloat16().T
    assert_close(cuda.linear(layer.x_ND, ffn.up), plain_NF, layer.x_ND.double() @ up_FD.double().T)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 2, 4])
def test_scores_of_rows_as_wide_as_a_real_model_s(N: int, kind: str) -> None:
    """As the predictor itself scores them."""
    device = torch.device("cuda")
    layer = Layer(device, 700, 5120, N)
    predictor = make_predictor(kind, layer, R=1024)
    score_NF = cuda.CudaSelector(predictor, device).scores(layer.x_ND)
    expected_NF = predictor.score(layer.x_ND.cpu())
    error = (score_NF.cpu() - expected_NF).norm() / expected_NF.norm()
    assert error < 1e-3, f"relative error {error:.1e}"


@pytest.mark.parametrize("N", [0, 17])
def test_other_numbers_of_tokens_are_refused(device: torch.device, N: int) -> None:
    layer = Layer(device, 37, 48, 1)
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        layer.ffn().forward(torch.randn(N, 48, device=device), "exact")


def test_inputs_of_low_bit_gates_are_rounded_alike(device: torch.device) -> None:
    x_ND = torch.randn(3, 96, device=device)
    x_ND[0, 32:64], x_ND[1, :32] = 0, torch.arange(32, device=device) - 15.5  # no size; halves
    assert torch.equal(cuda.round_inputs(x_ND), rounded_inputs(x_ND))


def test_norm_and_dense_activation(device: torch.device) -> None:
    x_ND, weight_D = torch.randn(3, 48, device=device), torch.rand(48, device=device)
    torch.testing.assert_close(
        cuda.rms_norm(x_ND, weight_D, 1e-5), reference.rms_norm(x_ND, weight_D, 1e-5)
    )
    gate, up = torch.randn(2, 3, 50, device=device)
    torch.testing.assert_close(cuda.activate(gate, up, 0.3), (gate > 0.3) * gate * up)


def in_order(pool: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """Each sequence's keys and values, [L, 2, G, S, K]."""
    return [pool[table].movedim(0, 3).flatten(3, 4) for table in tables]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "K"), [(4, 4, 24), (6, 2, 16)])
def test_attention_matches_the_reference(
    device: torch.device, H: int, G: int, K: int, dtype: torch.dtype
) -> None:
    """Sequences of unequal lengths, in blocks of 8 in any order; what is not filled is NaN, and
    other layers stay untouched."""
    lengths, D, layer = [1, 7, 50], 32, 1
    pool = torch.randn(9, 2, 2, G, 8, K).to(dtype).to(device)
    blocks = [torch.tensor(ids).to(device) for ids in ([3], [8], [5, 0, 7, 1, 2, 6, 4])]
    for table, length in zip(blocks, lengths, strict=True):
        pool[table[-1], :, :, :, (length - 1) % 8 :] = torch.nan
    before = in_order(pool, blocks)
    angle_SK = torch.rand(100, K // 2).to(device) * 6
    tables = angle_SK.cos(), angle_SK.sin()
    buffers = AttentionBuffers(H, G, K, device)
    attention = CudaAttention(
        layer, torch.rand(D, device=device), torch.randn((H + 2 * G) * K, D, device=device),
        torch.randn(D, H * K, device=device), *tables,
        num_heads=H, num_kv_heads=G, eps=1e-5, dtype=dtype, buffers=buffers,
    )  # fmt: skip
    qkv_NC = torch.randn(3, (H + 2 * G) * K, device=device)
    kv = KvBatch.of([pool] * 3, blocks, [length - 1 for length in lengths])
    out_NHK = attention.attend(qkv_NC, kv)
    assert not buffers.ended.any()
    for n, (cache, length) in enumerate(zip(in_order(pool, blocks), lengths, strict=True)):
        p = length - 1
        heads_1HK = qkv_NC[n].view(1, -1, K)
        turned_HK = reference.rope(heads_1HK[:, : H + G], *(t[p : p + 1] for t in tables))[0]
        kept_2GK = torch.stack((turned_HK[H:], heads_1HK[0, H + G :]))
        close = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(cache[layer, :, :, p].float(), kept_2GK, **close)
        k_GSK, v_GSK = cache[layer, :, :, :length]
        expected_HK = reference.attention(turned_HK[:H], k_GSK, v_GSK)
        torch.testing.assert_close(out_NHK[n].view(H, K), expected_HK, rtol=1e-5, atol=1e-5)
        assert torch.equal(cache[:, :, :, :p], before[n][:, :, :, :p])
        assert cache[0, :, :, p:].isnan().all()


def test_the_attention_block_adds_to_the_residual(device: torch.device) -> None:
    """x += attention(rms_norm(x) qkv^T) o^T at position 0, where attention is v itself."""
    H, G, K, D = 4, 2, 16, 32
    qkv_CD, o_DC = torch.randn((H + 2 * G) * K, D) / 6, torch.randn(D, H * K) / 8
    norm_D, x_ND = torch.rand(D), torch.randn(1, D)
    pool = torch.full((1, 1, 2, G, 4, K), torch.nan, device=device)
    table = torch.zeros(1, dtype=torch.int64, device=device)
    kv = KvBatch.of([pool], [table], [0])
    attention = CudaAttention(
        0, norm_D.to(device), qkv_CD.to(device), o_DC.to(device),
        torch.ones(4, K // 2, device=device), torch.zeros(4, K // 2, device=device),
        num_heads=H, num_kv_heads=G, eps=1e-5, dtype=torch.float32,
        buffers=AttentionBuffers(H, G, K, device),
    )  # fmt: skip
    result_ND = x_ND.clone().to(device)
    attention.forward(result_ND, kv)
    v_GK = (reference.rms_norm(x_ND, norm_D, 1e-5) @ qkv_CD.T)[0, (H + G) * K :].view(G, K)
    expected_ND = x_ND + v_GK.repeat_interleave(H // G, dim=0).flatten() @ o_DC.T
    torch.testing.assert_close(result_ND.cpu(), expected_ND, rtol=1e-4, atol=1e-4)
