"""The sparse FFN of the C++ kernels: parity, bit-identity of its modes, and what it does not read.

Tolerances: twice the fp32 torch error plus the rounding bound carried through the three products
(tests/test_kernels.py); the reference is taken in fp64.
"""

import threading
import time

import pytest
import torch
from torch import Tensor

from predictor import MlpPredictor, Predictor
from predictor.kinds import GateCopy, SignGate
from predictor.low_bits import pack_nibbles, rounded_inputs
from predictor.mlp import Int4MlpPredictor
from runtime.kernels import reference
from runtime.kernels.quantized import QuantizedMatrix

cpu = pytest.importorskip("runtime.kernels.cpu", reason="the C++ extension is not built")
pytestmark = pytest.mark.usefixtures("one_thread")

UNIT_ROUNDOFF = 2.0**-24
SHAPES = [(1, 1), (1, 33), (63, 17), (64, 64), (201, 577), (130, 96)]  # F, D


class Layer:
    def __init__(
        self, F: int, D: int, dtype: torch.dtype = torch.bfloat16, threshold: float = 0.3
    ) -> None:
        self.gate_FD, self.up_FD, self.down_FD = (
            (torch.randn(F, D) / D**0.5).to(dtype) for _ in range(3)
        )
        self.threshold = threshold

    def ffn(self, predictor: Predictor | None = None) -> "cpu.CpuFfn":
        return cpu.CpuFfn(self.gate_FD, self.up_FD, self.down_FD, self.threshold, predictor)

    def active(self, x_ND: Tensor) -> Tensor:
        weights = self.gate_FD, self.up_FD
        return reference.activations(x_ND, *weights, self.threshold) != 0

    def double(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_FD.double(), self.up_FD.double(), self.down_FD.double()

    def truth(self, x_ND: Tensor, mask_NF: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y_ND in fp64, and the rounding bound of an fp32 evaluation, element by element."""
        gate_FD, up_FD, down_FD = self.double()
        x, size = x_ND.double(), x_ND.shape[1] ** 0.5
        gate, up = x @ gate_FD.T, x @ up_FD.T
        fires = gate > self.threshold
        if mask_NF is not None:
            fires &= mask_NF
        act = torch.where(fires, gate, 0.0)
        gate_error = UNIT_ROUNDOFF * size * (x.abs() @ gate_FD.abs().T)
        up_error = UNIT_ROUNDOFF * size * (x.abs() @ up_FD.abs().T)
        near_edge = (gate - self.threshold).abs() <= gate_error  # these may fall on either side
        h_error = gate_error * up.abs() + up_error * act + near_edge * (gate * up).abs()
        h_rounding = UNIT_ROUNDOFF * (2 + self.gate_FD.shape[0] ** 0.5) * (act * up).abs()
        return (act * up) @ down_FD, (h_error + h_rounding) @ down_FD.abs()


def make_predictor(F: int, D: int, R: int = 10, threshold: float = 0.1) -> MlpPredictor:
    return MlpPredictor.from_float(
        torch.randn(R, D) / D**0.5,
        torch.randn(R) / 4,
        torch.randn(F, R) / R**0.5,
        torch.randn(F) / 4,
        threshold,
    )


GATE_KINDS = ("gate-int8", "gate-int4", "sign")
KINDS = ("mlp-int4", *GATE_KINDS)


def predictor_of(kind: str, gate_FD: Tensor, threshold: float = 0.2) -> Predictor:
    """For layers of this gate's shape; those that are made of the gate know it."""
    if kind == "mlp-int4":
        return Int4MlpPredictor.of(make_predictor(*gate_FD.shape, R=70, threshold=threshold))
    if kind == "sign":
        return SignGate.of(gate_FD).with_threshold(4)
    return GateCopy.of(gate_FD, int(kind.removeprefix("gate-int")), threshold)


def all_true_predictor(F: int, D: int) -> MlpPredictor:
    return make_predictor(F, D, threshold=-1e9)


def exact_mask_predictor(mask_F: Tensor, D: int) -> MlpPredictor:
    """Selects the same given neurons for every token, by its bias."""
    F = mask_F.numel()
    bias_F = torch.where(mask_F, 1.0, -1.0)
    return MlpPredictor.from_float(
        torch.zeros(3, D), torch.zeros(3), torch.zeros(F, 3), bias_F, 0.0
    )


def assert_close(result: Tensor, plain: Tensor, truth: Tensor, rounding: Tensor) -> None:
    error = (result.double() - truth).abs()
    bound = 2 * (plain.double() - truth).abs().max() + rounding
    where = int((error - bound).argmax())
    message = f"error {error.flatten()[where]:.3e}, bound {bound.flatten()[where]:.3e} at {where}"
    assert bool((error <= bound).all()), message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 5, 17])
@pytest.mark.parametrize(("F", "D"), SHAPES)
def test_modes_match_the_reference(isa: str, dtype: torch.dtype, N: int, F: int, D: int) -> None:
    layer, predictor, x_ND = Layer(F, D, dtype), make_predictor(F, D), torch.randn(N, D)
    ffn = layer.ffn(predictor)
    weights = layer.gate_FD, layer.up_FD, layer.down_FD, layer.threshold
    dense_ND = ffn.forward(x_ND, "dense", out=torch.full((N, D), torch.nan))
    assert_close(dense_ND, reference.ffn(x_ND, *weights), *layer.truth(x_ND))
    assert torch.equal(ffn.forward(x_ND, "exact", out=torch.full((N, D), torch.nan)), dense_ND)
    mask_NF = ffn.select(x_ND)
    predicted_ND = ffn.forward(x_ND, "predicted", out=torch.full((N, D), torch.nan))
    plain = reference.ffn(x_ND, *weights, mask_NF)
    assert_close(predicted_ND, plain, *layer.truth(x_ND, mask_NF))
    everything = layer.ffn(all_true_predictor(F, D))
    assert torch.equal(everything.forward(x_ND, "predicted"), dense_ND)


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_nothing_depends_on_batch_mates_or_threads(isa: str, mode: str) -> None:
    layer, predictor, x_ND = Layer(201, 577), make_predictor(201, 577), torch.randn(17, 577)
    ffn = layer.ffn(predictor)
    cpu.set_num_threads(1)
    alone = torch.cat([ffn.forward(x_D[None], mode) for x_D in x_ND])
    for num_threads in (1, 2, 3):
        cpu.set_num_threads(num_threads)
        assert torch.equal(ffn.forward(x_ND, mode), alone)
        assert torch.equal(ffn.forward(x_ND[3:8].contiguous(), mode), alone[3:8])


@pytest.mark.parametrize("N", [1, 3])
def test_exact_mode_reads_no_row_that_no_token_needs(isa: str, N: int) -> None:
    layer, x_ND = Layer(150, 48, threshold=1.0), torch.randn(N, 48)
    expected = layer.ffn().forward(x_ND, "exact")
    unused_F = ~layer.active(x_ND).any(0)
    assert 0 < unused_F.sum() < 150
    layer.up_FD[unused_F] = torch.nan
    layer.down_FD[unused_F] = torch.nan
    assert torch.equal(layer.ffn().forward(x_ND, "exact"), expected)
    assert bool(layer.ffn().forward(x_ND, "dense").isnan().all()), "dense reads every row"


def test_a_batch_mate_s_rows_do_not_reach_a_token(isa: str) -> None:
    layer, x_ND = Layer(150, 48, threshold=1.0), torch.randn(2, 48)
    first, second = layer.active(x_ND)
    expected = layer.ffn().forward(x_ND[:1], "exact")
    layer.down_FD[second & ~first] = torch.nan
    y_ND = layer.ffn().forward(x_ND, "exact")
    assert torch.equal(y_ND[:1], expected)
    assert bool(y_ND[1].isnan().all())


def test_predicted_mode_reads_no_row_that_is_not_selected(isa: str) -> None:
    F, D = 150, 48
    layer, x_ND = Layer(F, D, threshold=0.5), torch.randn(2, D)
    selected_F = torch.rand(F) < 0.4
    predictor = exact_mask_predictor(selected_F, D)
    expected = layer.ffn(predictor).forward(x_ND, "predicted")
    used_F = selected_F & layer.active(x_ND).any(0)
    layer.gate_FD[~selected_F] = torch.nan
    layer.up_FD[~used_F] = torch.nan
    layer.down_FD[~used_F] = torch.nan
    ffn = layer.ffn(predictor)
    assert torch.equal(ffn.forward(x_ND, "predicted"), expected)
    assert ffn.last_counts[0].tolist() == [int(selected_F.sum())] * 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_an_oracle_mask_gives_the_dense_result(isa: str, share: float) -> None:
    F, D, x_ND = 150, 48, torch.randn(1, 48)
    layer = Layer(F, D)
    gate_F = reference.linear(x_ND, layer.gate_FD)[0]
    layer.threshold = float(gate_F.sort().values[round((F - 1) * (1 - share))]) - 1e-4
    if share == 0.0:
        layer.threshold = float(gate_F.max()) + 1
    active_F = layer.active(x_ND)[0]
    assert abs(float(active_F.float().mean()) - share) < 0.02
    ffn = layer.ffn(exact_mask_predictor(active_F, D))
    dense = ffn.forward(x_ND, "dense")
    assert torch.equal(ffn.forward(x_ND, "predicted"), dense)
    selected_N, active_N = ffn.last_counts
    assert selected_N.tolist() == active_N.tolist() == [int(active_F.sum())]
    assert bool(dense.any()) == (share > 0)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_gate_at_the_threshold_does_not_fire(isa: str, mode: str) -> None:
    D = 16
    gate_FD = torch.zeros(3, D)
    gate_FD[:, 0] = torch.tensor([0.25, 0.25 + 2**-20, 0.25 - 2**-20])
    x_ND = torch.zeros(1, D)
    x_ND[0, :2] = 1.0
    up_FD, down_FD = torch.zeros(3, D), torch.eye(3, D)
    up_FD[:, 1] = 1.0
    ffn = cpu.CpuFfn(gate_FD, up_FD, down_FD, 0.25)
    assert ffn.forward(x_ND, mode)[0, :3].tolist() == [0.0, 0.25 + 2**-20, 0.0]
    assert ffn.last_counts[1].tolist() == [1]


def test_counts_counter_activations_and_always_hot(isa: str) -> None:
    F, D, N, hot = 150, 48, 5, 70
    layer, x_ND, predictor = Layer(F, D), torch.randn(5, 48), make_predictor(F, D)
    ffn, counter_F = layer.ffn(predictor), torch.zeros(F, dtype=torch.int64)
    ffn.set_counter(counter_F)
    h_NF, mask_NF = ffn.activations(x_ND), ffn.select(x_ND)
    torch.testing.assert_close(
        h_NF, reference.activations(x_ND, layer.gate_FD, layer.up_FD, layer.threshold)
    )
    for mode, selected_NF in (
        ("dense", torch.ones(N, F, dtype=torch.bool)),
        ("exact", torch.ones(N, F, dtype=torch.bool)),
        ("predicted", mask_NF),
    ):
        counter_F.zero_()
        ffn.forward(x_ND, mode)
        active_NF = (h_NF != 0) & selected_NF
        assert torch.equal(ffn.last_counts[0], selected_NF.sum(1))
        assert torch.equal(ffn.last_counts[1], active_NF.sum(1))
        assert torch.equal(counter_F, active_NF.sum(0))
    hot_NF = ffn.select(x_ND, always_hot=hot)
    assert bool(hot_NF[:, :hot].all())
    assert torch.equal(hot_NF[:, hot:], mask_NF[:, hot:])
    ffn.set_counter(None)
    counter_F.zero_()
    ffn.forward(x_ND, "predicted", always_hot=hot)
    assert torch.equal(ffn.last_counts[0], hot_NF.sum(1))
    assert not bool(counter_F.any())


def test_usage_adds_up_what_the_calls_did(isa: str) -> None:
    F, D = 150, 48
    layer, predictor = Layer(F, D), make_predictor(F, D)
    ffn, three_ND, one_ND = layer.ffn(predictor), torch.randn(3, D), torch.randn(1, D)
    start = time.perf_counter()
    for mode, x_ND in (("dense", three_ND), ("predicted", three_ND), ("predicted", one_ND)):
        ffn.forward(x_ND, mode)
        ffn.forward(x_ND, mode)
    seconds = time.perf_counter() - start
    usage = ffn.take_usage()
    rows = {(row.mode, row.batch): row for row in usage.counts}
    assert list(rows) == [("dense", 3), ("predicted", 1), ("predicted", 3)]
    for (mode, N), row in rows.items():
        x_ND = one_ND if N == 1 else three_ND
        all_NF = torch.ones(N, F, dtype=torch.bool)
        selected_NF = all_NF if mode == "dense" else ffn.select(x_ND)
        active_NF = (ffn.activations(x_ND) != 0) & selected_NF
        assert row.calls == 2
        assert row.selected == 2 * int(selected_NF.sum())
        assert row.active == 2 * int(active_NF.sum())
        assert row.united == 2 * int(active_NF.any(0).sum())
    parts = (usage.select_s, usage.gate_s, usage.up_down_s)
    assert min(parts) > 0
    assert usage.wait_s >= 0
    assert sum(parts) + usage.wait_s < seconds
    again = ffn.take_usage()
    assert (again.counts, again.gate_s) == ((), 0.0)


@pytest.mark.parametrize(("F", "D", "R"), [(150, 48, 1), (130, 577, 67)])
def test_scores_match_the_predictor_s_definition(isa: str, F: int, D: int, R: int) -> None:
    predictor, x_ND = make_predictor(F, D, R), torch.randn(5, D)
    ffn = Layer(F, D).ffn(predictor)
    fc1_RD = predictor.fc1_q_RD.double() * predictor.fc1_scale_R.double()[:, None]
    fc2_FR = predictor.fc2_q_FR.double() * predictor.fc2_scale_F.double()[:, None]
    x = x_ND.double()
    hidden = (x @ fc1_RD.T + predictor.bias_R).relu()
    truth = hidden @ fc2_FR.T + predictor.bias_F
    hidden_error = UNIT_ROUNDOFF * ((3 + D**0.5) * (x.abs() @ fc1_RD.abs().T) + hidden)
    rounding = hidden_error @ fc2_FR.abs().T + UNIT_ROUNDOFF * (
        (3 + R**0.5) * (hidden @ fc2_FR.abs().T) + truth.abs()
    )
    score_NF = ffn.scores(x_ND)
    assert_close(score_NF, predictor.score(x_ND), truth, rounding)
    assert torch.equal(ffn.select(x_ND), score_NF > predictor.threshold)
    ffn.set_threshold(0.7)
    assert torch.equal(ffn.select(x_ND), score_NF > 0.7)


@pytest.mark.parametrize(("F", "D", "R"), [(1, 32, 1), (63, 64, 32), (201, 544, 70)])
def test_scores_of_a_network_in_4_bits_match_its_definition(
    isa: str, F: int, D: int, R: int
) -> None:
    predictor, x_ND = Int4MlpPredictor.of(make_predictor(F, D, R)), torch.randn(17, D)
    fc1_RD, fc2_FR = predictor.fc1_RD.double(), predictor.fc2_FR.double()
    x = rounded_inputs(x_ND).double()
    exact = (x @ fc1_RD.T + predictor.bias_R).relu()
    hidden = rounded_inputs(exact.float()).double()
    truth = hidden @ fc2_FR.T + predictor.bias_F
    hidden_error = UNIT_ROUNDOFF * ((6 + D**0.5) * (x.abs() @ fc1_RD.abs().T) + exact)
    # A hidden unit that lies this near to the middle of two whole numbers may become either.
    step = exact.view(17, -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
    off = (exact / step.clamp(min=1e-30)) % 1 - 0.5
    hidden_error += torch.where(off.abs() * step <= 2 * hidden_error, step, 0.0)
    rounding = hidden_error @ fc2_FR.abs().T + UNIT_ROUNDOFF * (
        (6 + R**0.5) * (hidden @ fc2_FR.abs().T) + truth.abs()
    )
    ffn = Layer(F, D).ffn(predictor)
    score_NF = ffn.scores(x_ND)
    assert_close(score_NF, predictor.score(x_ND), truth, rounding)
    assert torch.equal(ffn.select(x_ND), score_NF > predictor.threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("N", [1, 17])
def test_rounding_hidden_units_leaves_the_rounded_inputs(isa: str, N: int, bits: int) -> None:
    """Both are rounded in one call: the gates are of the inputs."""
    layer, x_ND = Layer(201, 544), torch.randn(N, 544)
    weights = [QuantizedMatrix.of(w, bits) for w in (layer.gate_FD, layer.up_FD, layer.down_FD)]
    ffn = cpu.CpuFfn(*weights, layer.threshold, predictor_of("mlp-int4", layer.gate_FD))
    selected_NF = ffn.select(x_ND)
    assert 0 < int(selected_NF.sum()) < selected_NF.numel()
    expected_ND = ffn.forward_selected(x_ND, selected_NF)
    assert torch.equal(ffn.forward(x_ND, "predicted"), expected_ND)


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize(("F", "D"), [(1, 32), (63, 64), (201, 544), (130, 576)])
def test_scores_of_gate_kinds_match_their_definition(isa: str, kind: str, F: int, D: int) -> None:
    layer, x_ND = Layer(F, D), torch.randn(5, D)
    x_ND[1, :32] = 0
    x_ND[2] *= 1e6
    x_ND[3, ::2] *= 1e-3
    predictor = predictor_of(kind, layer.gate_FD)
    ffn = layer.ffn(predictor)
    score_NF = ffn.scores(x_ND)
    if isinstance(predictor, GateCopy):
        x, copy_FD = rounded_inputs(x_ND).double(), predictor.copy_FD.double()
        terms = 6 + (D / 32) ** 0.5  # scales, then groups, then eight lanes; groups are exact
        rounding = UNIT_ROUNDOFF * terms * (x.abs() @ copy_FD.abs().T)
        assert_close(score_NF, predictor.score(x_ND), x @ copy_FD.T, rounding)
    else:
        assert torch.equal(score_NF, predictor.score(x_ND))
    assert torch.equal(ffn.select(x_ND), score_NF > predictor.threshold)
    ffn.set_threshold(0.7)
    assert torch.equal(ffn.select(x_ND), score_NF > 0.7)


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_at_their_limits_add_up_exactly(isa: str, bits: int) -> None:
    """The largest products of one sign do not overflow, nor does a halved one round astray."""
    F, D = 9, 96
    q_FD = torch.where(torch.rand(F, D) < 0.5, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    q_FD[0], q_FD[1] = q_FD.max(), q_FD.min()
    x_ND = torch.cat((torch.full((1, D), 127.0), torch.randint(-127, 128, (6, D)).float()))
    x_ND[:, ::32] = 127  # so that the scales are 1
    x_ND[5:, 1::2] += 0.5  # halves, to the even neighbour
    x_ND[5:, 1::2].clamp_(max=126.5)
    q_FD = q_FD.to(torch.int8)
    packed_FB = q_FD if bits == 8 else pack_nibbles(q_FD)
    scale_FC = torch.ones(F, 3, dtype=torch.float16)
    predictor = GateCopy(packed_FB, scale_FC, kind=f"gate-int{bits}", threshold=0.0)
    expected_NF = x_ND.round().clamp(-127, 127).double() @ q_FD.double().T
    assert torch.equal(Layer(F, D).ffn(predictor).scores(x_ND).double(), expected_NF)
    assert torch.equal(predictor.score(x_ND).double(), expected_NF)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_read_their_own_rows_only(isa: str, kind: str) -> None:
    F, D = 150, 64
    layer, x_ND = Layer(F, D, threshold=0.5), torch.randn(2, D)
    predictor = predictor_of(kind, layer.gate_FD)
    selected_NF = predictor.select(x_ND)
    expected = layer.ffn(predictor).forward(x_ND, "predicted")
    plain = reference.ffn(
        x_ND, layer.gate_FD, layer.up_FD, layer.down_FD, layer.threshold, selected_NF
    )
    assert_close(expected, plain, *layer.truth(x_ND, selected_NF))
    selected_F, used_F = selected_NF.any(0), (selected_NF & layer.active(x_ND)).any(0)
    assert 0 < used_F.sum() < selected_F.sum() < F
    layer.gate_FD[~selected_F] = torch.nan
    layer.up_FD[~used_F] = torch.nan
    layer.down_FD[~used_F] = torch.nan
    ffn = layer.ffn(predictor)
    assert torch.equal(ffn.forward(x_ND, "predicted"), expected)
    assert torch.equal(ffn.last_counts[0], selected_NF.sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_depend_on_neither_batch_mates_nor_threads(isa: str, kind: str) -> None:
    layer, x_ND = Layer(201, 576), torch.randn(19, 576)
    ffn = layer.ffn(predictor_of(kind, layer.gate_FD))
    alone = torch.cat([ffn.forward(x_D[None], "predicted") for x_D in x_ND])
    scores = torch.cat([ffn.scores(x_D[None]) for x_D in x_ND])
    for num_threads in (1, 3):
        cpu.set_num_threads(num_threads)
        assert torch.equal(ffn.forward(x_ND, "predicted"), alone)
        assert torch.equal(ffn.scores(x_ND[2:6].contiguous()), scores[2:6])
        assert torch.equal(ffn.scores(x_ND), scores)


@pytest.mark.parametrize("kind", ["mlp-int4", "gate-int8", "gate-int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_selects_nothing(isa: str, kind: str, bad: float) -> None:
    layer, x_ND = Layer(70, 64), torch.randn(3, 64)
    predictor = predictor_of(kind, layer.gate_FD)
    ffn, good_NF = layer.ffn(predictor), predictor.select(x_ND)
    x_ND[1, 40] = bad
    assert bool(predictor.score(x_ND)[1].isnan().all())
    assert bool(ffn.scores(x_ND)[1].isnan().all())
    assert ffn.select(x_ND).sum(1).tolist() == [int(good_NF[0].sum()), 0, int(good_NF[2].sum())]


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_residual_form_is_norm_ffn_and_sum(isa: str, mode: str) -> None:
    layer, x_ND, norm_D = Layer(150, 577), torch.randn(3, 577), torch.rand(577).bfloat16()
    ffn = layer.ffn(make_predictor(150, 577))
    expected = x_ND + ffn.forward(cpu.rms_norm(x_ND, norm_D, 1e-5), mode)
    ffn.forward_residual(x_ND, norm_D, 1e-5, mode)
    assert torch.equal(x_ND, expected)


def test_wrong_arguments_are_refused() -> None:
    layer, x_ND = Layer(20, 8), torch.randn(2, 8)
    ffn, gate, up = layer.ffn(), layer.gate_FD, layer.up_FD
    narrow = make_predictor(20, 7)
    wide = Layer(20, 64)
    fewer, narrower = Layer(19, 64).gate_FD, Layer(20, 32).gate_FD
    refused = [
        (r"mode must be 'dense', 'exact' or 'predicted'", lambda: ffn.forward(x_ND, "fast")),
        (r"no predictor.*train-predictors", lambda: ffn.forward(x_ND, "predicted")),
        (r"no predictor", lambda: ffn.select(x_ND)),
        (r"x_ND must be of shape \[any, 8\]", lambda: ffn.forward(torch.randn(2, 9), "exact")),
        (r"x_ND must be float32", lambda: ffn.forward(x_ND.double(), "exact")),
        (r"down_FD must be of shape \[20, 8\]", lambda: cpu.CpuFfn(gate, up, up.T.contiguous())),
        (r"up_FD must be float32 or bfloat16", lambda: cpu.CpuFfn(gate, up.half(), up)),
        (r"fc1_q_RD must be of shape \[any, 8\]", lambda: layer.ffn(narrow)),
        (r"scores 19 neurons; .* 20", lambda: wide.ffn(predictor_of("gate-int4", fewer))),
        (
            r"strips_SB must be of shape \[2, 512\]",
            lambda: wide.ffn(predictor_of("gate-int4", narrower)),
        ),
        (
            r"scale_FC must be of shape \[20, 2\]",
            lambda: wide.ffn(predictor_of("gate-int8", narrower)),
        ),
        (
            r"bits_FB must be of shape \[20, 8\]",
            lambda: wide.ffn(predictor_of("sign", narrower)),
        ),
        (r"groups of 32", lambda: layer.ffn(predictor_of("gate-int8", narrower))),
        (r"bias_F must be .* \[20\]", lambda: wide.ffn(predictor_of("mlp-int4", fewer))),
        (r"fc1_SB must be .* \[6, 512\]", lambda: wide.ffn(predictor_of("mlp-int4", narrower))),
        (r"groups of 32", lambda: layer.ffn(predictor_of("mlp-int4", narrower))),
        (r"counter_F must be int64", lambda: ffn.set_counter(torch.zeros(20))),
        (r"always_hot", lambda: ffn.forward(x_ND, "exact", always_hot=21)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_no_tokens_is_no_work(mode: str) -> None:
    ffn, shapes = Layer(20, 8).ffn(make_predictor(20, 8)), []

    def call() -> None:
        shapes.append(ffn.forward(torch.empty(0, 8), mode).shape)

    thread = threading.Thread(target=call)  # a thread of its own has no buffers from other tests
    thread.start()
    thread.join()
    assert shapes == [(0, 8)]
    assert ffn.last_counts[0].tolist() == []
