"""Hot plus cold is the whole, in every mode and by every backend; rows are permuted hot-first once.

The accelerator here is the CPU: the same split, thread and join as with a GPU.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny

import pytest
import torch

from predictor import MlpPredictor, PredictorSet
from predictor.fingerprint import read_gate
from predictor.kinds import GateCopy, SignGate
from predictor.mlp import Int4MlpPredictor
from runtime.accelerator import HostAccelerator, Program
from runtime.ffn import SparseFFN
from runtime.hybrid import HybridFFN
from runtime.hybrid_meter import HYBRID_PARTS, HybridMeter
from runtime.model import Model
from runtime.placement import Home, Placement

L, F, VOCAB_SIZE = 3, 160, 264
# fp32 sums of about 160 terms near 1 in another order
FP32 = {"rtol": 1e-4, "atol": 5e-5}
MODES = ("dense", "exact", "predicted")


def shuffled(num_hot_L: tuple[int, ...], home_L: tuple[Home, ...] = ()) -> Placement:
    generator = torch.Generator().manual_seed(3)
    order_LF = torch.stack([torch.randperm(F, generator=generator) for _ in num_hot_L])
    return Placement(order_LF, num_hot_L, home_L)


class RunningAgain(HostAccelerator):
    """A GPU's place taken by the CPU: Triton's interpreter, and recordings that are run again by
    calling the step again. Recorded host steps are thereby not told apart from the rest; vectors,
    buffers and caches are."""

    can_record = runs_triton = True
    runs_cpp = False
    num_runs = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Program:
        def run() -> None:
            self.num_runs += 1
            result_NV.resize_(0).set_(work())

        result_NV = torch.empty(0)
        return Program([run], result_NV)


@pytest.fixture
def pair(make_tiny_model: Callable[..., Path], tiny: Tiny):
    """(whole, split) models of the same folder, with predictors that miss some neurons."""
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=[0.1, 0.2, 0.4])
    predictors = tiny.predictors(folder, "gate")
    predictors.layers[:] = [p.with_threshold(0.6) for p in predictors.layers]

    def pair(
        num_hot_L: tuple[int, ...],
        kernels: str,
        dtype: str = "float32",
        home_L: tuple[Home, ...] = (),
    ):
        arguments = {"dtype": dtype, "kernels": kernels, "predictors": predictors}
        whole = Model.from_folder(folder, **arguments)
        return whole, Model.from_folder(folder, **arguments, placement=shuffled(num_hot_L, home_L))

    return pair


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("num_hot_L", [(80, 80, 80), (1, 0, 159), (160, 7, 160)])
def test_hot_plus_cold_is_the_whole(
    pair, num_hot_L: tuple[int, ...], kernels: str, mode: str
) -> None:
    whole, split = pair(num_hot_L, kernels)
    assert split.num_hot_L == list(num_hot_L)
    kinds = [isinstance(layer.ffn, HybridFFN) for layer in split.layers]
    assert kinds == [0 < n < F for n in num_hot_L]
    ids_N = torch.randint(0, 256, (20,))
    caches = [model.new_cache(20) for model in (whole, split)]
    first = [
        model.prefill(ids_N[:12], c, mode) for model, c in zip((whole, split), caches, strict=True)
    ]
    torch.testing.assert_close(first[1], first[0], **FP32)
    for n in range(12, 20):
        expected_NV = whole.decode(ids_N[n : n + 1], caches[:1], mode)
        torch.testing.assert_close(
            split.decode(ids_N[n : n + 1], caches[1:], mode), expected_NV, **FP32
        )
    torch.testing.assert_close(split.forward(ids_N, mode), whole.forward(ids_N, mode), **FP32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("home_L", "num_hot_L"),
    [
        (("accelerator", "streamed", "streamed"), (80, 0, 40)),
        (("host", "host", "streamed"), (0, 0, 160)),
        (("streamed", "host", "accelerator"), (20, 0, 0)),
        (("host", "accelerator", "host"), (0, 160, 0)),
        (("host",) * 3, (0, 0, 0)),
    ],
)
def test_layers_on_either_side(
    pair, home_L: tuple[Home, ...], num_hot_L: tuple[int, ...], kernels: str, mode: str
) -> None:
    """Two sequences, decoded in turns and then together: caches, slot and buffers are theirs."""
    whole, split = pair(num_hot_L, kernels, home_L=home_L)
    assert [layer.is_on_host for layer in split.layers] == [home == "host" for home in home_L]
    texts = torch.randint(0, 256, (2, 16))
    caches = [[model.new_cache(20) for _ in texts] for model in (whole, split)]
    for i, ids_N in enumerate(texts):
        logits = [
            m.prefill(ids_N[:8], c[i], mode) for m, c in zip((whole, split), caches, strict=True)
        ]
        torch.testing.assert_close(logits[1], logits[0], **FP32)
    for n in range(8, 16):
        batches = [[0, 1]] if n > 11 else [[0], [1]]
        for batch in batches:
            logits = [
                model.decode(texts[batch, n], [kept[i] for i in batch], mode)
                for model, kept in zip((whole, split), caches, strict=True)
            ]
            torch.testing.assert_close(logits[1], logits[0], **FP32)


def test_some_steps_are_timed(pair) -> None:
    whole, split = pair((80, 0, 40), "cpu")
    assert HybridMeter(whole.layers).report() is None
    meter = HybridMeter(split.layers, every=2)
    cache = split.new_cache(20)
    split.prefill(torch.tensor([1, 2, 3]), cache)
    assert meter.report() == {"timed_steps": 0, "every": 2, "layers": 2, "per_step": {}}
    for token in range(5):
        with meter.step():
            split.decode([token], [cache], "predicted")
    report = meter.report()
    per_step = report.pop("per_step")
    assert report == {"timed_steps": 2, "every": 2, "layers": 2}
    assert set(per_step) == set(HYBRID_PARTS)
    # Moments of this accelerator, a thread, may come late; the host's own times are exact.
    assert per_step["cpu_s"] > 0
    assert per_step["wait_s"] >= 0


@pytest.mark.parametrize(
    ("mode", "num_hot_L", "home_L"),
    [
        ("dense", (0, 80, 40), ()),
        ("predicted", (0, 80, 40), ("host", "streamed", "accelerator")),
        ("exact", (160,) * 3, ()),
    ],
)
def test_recorded_steps_are_the_steps(
    pair,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    num_hot_L: tuple[int, ...],
    home_L: tuple[Home, ...],
) -> None:
    """For sequences in turns and together, with an unrecorded step between."""
    cuda = pytest.importorskip("runtime.kernels.cuda", reason="Triton is not installed")
    few_programs = cuda.Tile(64, 64, 64, 4)  # the interpreter takes milliseconds for each
    monkeypatch.setattr(cuda, "_fitting", lambda tiles, N, D: few_programs)
    monkeypatch.setattr("runtime.kernels.cuda_decode.MAX_SPLITS", 2)
    whole, _ = pair(num_hot_L, "cpu")
    monkeypatch.setattr("runtime.model.new_accelerator", lambda device: RunningAgain())
    _, split = pair(num_hot_L, "cpu", home_L=home_L)
    texts = torch.randint(0, 256, (2, 12))
    caches = [[model.new_cache(20) for _ in texts] for model in (whole, split)]
    for i, ids_N in enumerate(texts):
        for model, kept in zip((whole, split), caches, strict=True):
            model.prefill(ids_N[:8], kept[i], mode)
    for n in range(8, 12):
        for batch in [[0, 1]] if n > 9 else [[0], [1]]:
            tap = (lambda layer, x_ND: None) if n == 9 and batch == [0] else None
            steps = zip((whole, split), caches, (None, tap), strict=True)
            expected_NV, logits_NV = (
                model.decode(texts[batch, n], [kept[i] for i in batch], mode, tap=model_tap)
                for model, kept, model_tap in steps
            )
            torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-3, atol=1e-3)
    assert split.accelerator.num_runs == 3


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_alone_answers_as_the_cpu(
    make_tiny_model: Callable[..., Path], tiny: Tiny, mode: str
) -> None:
    """An engine's steps, recorded and not, of one sequence and of several."""
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.2)
    predictors = tiny.predictors(folder, "gate")
    host, gpu = (
        Model.from_folder(
            folder, device=device, dtype="float32", kernels="cpu", predictors=predictors
        )
        for device in ("cpu", "cuda")
    )
    assert gpu.accelerator.runs_triton
    texts = torch.randint(0, 256, (6, 24))
    for batch in ([0], [1, 2, 3], [0, 1, 2, 3, 4, 5]):
        caches = [[model.new_cache(24) for _ in batch] for model in (host, gpu)]
        for model, kept in zip((host, gpu), caches, strict=True):
            for i, cache in zip(batch, kept, strict=True):
                model.prefill(texts[i, :10], cache, mode)
        for n in range(10, 24):
            expected_NV, logits_NV = (
                model.decode(texts[batch, n], kept, mode).cpu()
                for model, kept in zip((host, gpu), caches, strict=True)
            )
            if mode != "predicted" or len(batch) <= 4:  # more are dense on a GPU
                torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_activations_selection_and_norms_are_permuted_alike(pair, kernels: str) -> None:
    whole, split = pair((80, 40, 0), kernels)
    placement = shuffled((80, 40, 0))
    x_ND = torch.randn(5, 64)
    for l in range(L):
        order_F = placement.order_LF[l]
        ffn, expected = split.layers[l].ffn, whole.layers[l].ffn
        torch.testing.assert_close(
            ffn.activations(x_ND), expected.activations(x_ND)[:, order_F], **FP32
        )
        assert torch.equal(ffn.select(x_ND), expected.select(x_ND)[:, order_F])
        assert torch.equal(split.down_norm_LF[l], whole.down_norm_LF[l][order_F])


def some_network(F: int, D: int, R: int = 32) -> MlpPredictor:
    weights = torch.randn(R, D) / D**0.5, torch.randn(R), torch.randn(F, R) / R**0.5, torch.randn(F)
    return MlpPredictor.from_float(*weights)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("kind", ["mlp-int4", "gate-int8", "gate-int4", "sign"])
def test_every_kind_of_predictor_is_split_like_its_neurons(
    make_tiny_model: Callable[..., Path], kind: str, kernels: str
) -> None:
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.2)
    gates = [read_gate(folder, l) for l in range(L)]
    if kind == "sign":
        layers = [SignGate.of(gate_FD) for gate_FD in gates]
    elif kind == "mlp-int4":
        layers = [Int4MlpPredictor.of(some_network(*gate_FD.shape)) for gate_FD in gates]
    else:
        bits = int(kind.removeprefix("gate-int"))
        layers = [GateCopy.of(gate_FD, bits, 0.4) for gate_FD in gates]
    placement = shuffled((80, 40, 0))
    arguments = {"dtype": "float32", "kernels": kernels, "predictors": PredictorSet(layers)}
    whole = Model.from_folder(folder, **arguments)
    split = Model.from_folder(folder, **arguments, placement=placement)
    x_ND = torch.randn(5, 64)
    for l in range(L):
        ffn, expected = split.layers[l].ffn, whole.layers[l].ffn
        mask_NF = expected.select(x_ND)
        assert torch.equal(mask_NF, layers[l].select(x_ND))
        assert 0 < int(mask_NF.sum()) < mask_NF.numel()
        assert torch.equal(ffn.select(x_ND), mask_NF[:, placement.order_LF[l]])
        torch.testing.assert_close(
            ffn.forward(x_ND, "predicted"), expected.forward(x_ND, "predicted"), **FP32
        )


def test_both_modes_lose_the_same_neurons(pair) -> None:
    """Predicted differs from exact on both sides of the split: the masks are really applied."""
    _, split = pair((80, 80, 80), "cpu")
    ffn = split.layers[0].ffn
    assert isinstance(ffn, HybridFFN)
    x_ND = torch.randn(4, 64)
    selected_NF = ffn.select(x_ND)
    for half, mask in zip((ffn.hot, ffn.cold), selected_NF.split(80, dim=1), strict=True):
        assert half is not None
        predicted_ND = half.forward(x_ND, "predicted", mask.contiguous())
        assert not torch.equal(predicted_ND, half.forward(x_ND, "exact"))


def test_hot_half_runs_beside_the_cold_one(pair) -> None:
    """The accelerator's part is started before the host's begins, and on a thread of its own."""
    _, split = pair((80, 80, 80), "cpu")
    ffn = split.layers[1].ffn
    assert isinstance(ffn, HybridFFN)
    assert isinstance(ffn.cold, SparseFFN)
    assert not isinstance(ffn.hot, SparseFFN)
    begun, threads = threading.Event(), []
    hot_forward, cold_forward = ffn.hot.forward, ffn.cold.forward_into

    def hot(*args):
        threads.append(threading.current_thread().name)
        begun.set()
        return hot_forward(*args)

    def cold(*args) -> None:
        assert begun.wait(10), "the hot half waits for the cold one"
        threads.append(threading.current_thread().name)
        cold_forward(*args)

    ffn.hot.forward, ffn.cold.forward_into = hot, cold
    ffn.forward(torch.randn(1, 64), "exact")
    assert threads[0].startswith("accelerator")
    assert threads[1] == threading.current_thread().name


def test_bf16_split_keeps_the_dense_exact_identity(pair) -> None:
    _, split = pair((80, 40, 159), "cpu", "bfloat16")
    ids_N = torch.randint(0, 256, (10,))
    rows = []
    for mode in ("dense", "exact"):
        cache = split.new_cache(20)
        split.prefill(ids_N, cache, mode)
        rows.append(torch.cat([split.decode(ids_N[n : n + 1], [cache], mode) for n in range(10)]))
    assert torch.equal(*rows)


def test_errors_of_the_cold_half_reach_the_caller(pair) -> None:
    _, split = pair((80, 80, 80), "cpu")
    ffn = split.layers[0].ffn
    with pytest.raises(Exception, match=r".+"):
        ffn.forward(torch.randn(1, 63), "exact")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(make_tiny_model: Callable[..., Path], tiny: Tiny, mode: str) -> None:
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.2)
    predictors = tiny.predictors(folder, "gate")
    whole = Model.from_folder(folder, dtype="float32", kernels="cpu", predictors=predictors)
    split = Model.from_folder(
        folder, dtype="float32", device="cuda", kernels="cpu", predictors=predictors,
        placement=shuffled((80, 0, 160)),
    )  # fmt: skip
    ids_N = torch.randint(0, 256, (20,))
    rows = []
    for model in (whole, split):
        cache = model.new_cache(20)
        first = model.prefill(ids_N[:10], cache, mode)[None]
        later = [model.decode(ids_N[n : n + 1], [cache], mode) for n in range(10, 20)]
        rows.append(torch.cat([first, *later]).cpu())
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-3)  # tf32 is off by default
