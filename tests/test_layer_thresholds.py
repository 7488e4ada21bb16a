"""A FATReLU threshold per layer: config, fingerprint, both forwards, and the search for them."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny
from typing import Any

import pytest
import torch
from torch import Tensor

from hotneuron.cli import main
from predictor import fingerprint
from predictor.fingerprint import FingerprintError
from predictor.thresholds import config_value, read_thresholds
from prosparse.decoding import DecodeCache, decode_step
from prosparse.errors import BadInput
from prosparse.evaluate import Allowance, compare, search_threshold
from prosparse.layer_thresholds import LayerSearch, Move, fill, measure_moves, spread
from prosparse.modeling import Llama, LlamaShape
from runtime.config import ModelConfig
from runtime.errors import UnsupportedModel
from runtime.model import Model

MakeModel = Callable[..., Path]
THRESHOLDS = [0.0, 0.3, 0.7]
FP32 = {"rtol": 1e-4, "atol": 5e-5}


def ids_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(make_tiny_model: MakeModel) -> Path:
    return make_tiny_model(hidden_act_param=THRESHOLDS)


@pytest.fixture(scope="module")
def expected_NV(folder: Path) -> Tensor:
    """transformers' logits of 30 tokens, with each layer's own activation."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer, threshold in zip(reference.model.layers, THRESHOLDS, strict=True):
        layer.mlp.act_fn = torch.nn.Threshold(threshold, 0.0)
    with torch.no_grad():
        return reference(ids_of(30)[None]).logits[0]


def test_one_reading_of_the_config() -> None:
    assert read_thresholds({}, 2) == (0.0, 0.0)
    assert read_thresholds({"hidden_act_param": None}, 2) == (0.0, 0.0)
    assert read_thresholds({"hidden_act_param": 1}, 2) == (1.0, 1.0)
    assert read_thresholds({"hidden_act_param": [0, 0.5]}, 2) == (0.0, 0.5)
    assert config_value((0.5, 0.5)) == 0.5
    assert config_value((0.0, 0.5)) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([0.1, 0.2], "lists 2 FATReLU thresholds for 3 layers"),
        ([0.1, -0.2, 0.1], "at least 0; got -0.2"),
        ([0.1, "a", 0.1], "holds 'a'"),
        ("0.1", "holds '0.1'"),
    ],
)
def test_bad_lists_are_refused_by_name(tiny: Tiny, tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_hf(tiny.config(hidden_act_param=value))
    bad = tiny.write_model(tmp_path / "bad", hidden_act_param=value)
    with pytest.raises(BadInput, match=words):
        LlamaShape.from_folder(bad)
    with pytest.raises(FingerprintError, match=words):
        fingerprint(bad)


def test_names(tiny: Tiny) -> None:
    config = ModelConfig.from_hf(tiny.config(hidden_act_param=THRESHOLDS))
    assert config.thresholds == tuple(THRESHOLDS)
    assert config.activation_name == "fatrelu(0 to 0.7 by layer)"
    same = ModelConfig.from_hf(tiny.config(hidden_act_param=[0.3] * 3))
    assert same.activation_name == "fatrelu(0.3)"
    assert ModelConfig.from_hf(tiny.config(hidden_act_param=[0.0] * 3)).activation_name == "relu"


def test_fingerprint_knows_every_layers_threshold(make_tiny_model: MakeModel) -> None:
    names = [
        fingerprint(make_tiny_model(hidden_act_param=value))
        for value in (0.3, [0.3, 0.3, 0.3], [0.3, 0.3, 0.4], [0.3, 0.4, 0.3], THRESHOLDS)
    ]
    assert names[0] == names[1], "a list of equal thresholds is the same model"
    assert len(set(names[1:])) == 4


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_the_runtime_honours_each_layers_own(
    folder: Path, expected_NV: Tensor, kernels: Any, mode: Any
) -> None:
    model = Model.from_folder(folder, dtype="float32", kernels=kernels)
    ids_N = ids_of(30)
    torch.testing.assert_close(model.forward(ids_N), expected_NV, **FP32)
    cache = model.new_cache(30)
    rows = [model.prefill(ids_N[:10], cache, mode)]
    rows += [model.decode(ids_N[n : n + 1], [cache], mode)[0] for n in range(10, 30)]
    torch.testing.assert_close(torch.stack(rows), expected_NV[9:], **FP32)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_each_layer_of_the_runtime_cuts_at_its_own(folder: Path, kernels: Any) -> None:
    model = Model.from_folder(folder, dtype="float32", kernels=kernels)
    x_ND = torch.randn(4, 64)
    for layer, threshold in zip(model.layers, THRESHOLDS, strict=True):
        gate_NF = x_ND @ layer.ffn.weights.gate_FD.T
        assert torch.equal(layer.ffn.activations(x_ND) != 0, gate_NF > threshold)


def test_training_has_the_same_model(folder: Path, expected_NV: Tensor) -> None:
    model = Llama(folder, dtype=torch.float32)
    ids_BS = ids_of(30)[None]
    torch.testing.assert_close(model.logits(model.hidden(ids_BS)[0][-1][0]), expected_NV, **FP32)
    cache = DecodeCache(model, 1, 30)
    steps = [decode_step(model, cache, ids_BS[:, n])[0] for n in range(30)]
    torch.testing.assert_close(torch.stack(steps), expected_NV, **FP32)


@pytest.fixture(scope="module")
def pair(make_tiny_model: MakeModel) -> tuple[Llama, Llama]:
    student = Llama(make_tiny_model(), dtype=torch.float32)
    return student, Llama(make_tiny_model(hidden_act="silu"), dtype=torch.float32)


class TestSearch:
    DOCUMENTS = tuple(ids_of(40, seed).tolist() for seed in range(3))

    def test_moves_are_what_comparing_would_say(self, pair: tuple[Llama, Llama]) -> None:
        student, teacher = pair
        before = [0.1, 0.2, 0.3]
        student.set_thresholds(before)
        base = compare(student, teacher, self.DOCUMENTS, 3)
        candidates = [(0, 0.4), (1, 0.0), (2, 0.6)]
        moves = measure_moves(student, teacher, self.DOCUMENTS, candidates, 3)
        for move, (layer, threshold) in zip(moves, candidates, strict=True):
            student.set_thresholds([threshold if l == layer else t for l, t in enumerate(before)])
            moved = compare(student, teacher, self.DOCUMENTS, 3)
            assert (move.layer, move.threshold) == (layer, threshold)
            assert move.kl == pytest.approx(moved.kl - base.kl, abs=1e-6)
            assert move.sparsity == pytest.approx(moved.sparsity - base.sparsity, abs=1e-9)

    @pytest.mark.parametrize("kl_left", [-0.05, 0.0, 0.02, 0.1, 1.0])
    def test_nothing_beats_a_fill_at_its_own_price(self, kl_left: float) -> None:
        random = torch.Generator().manual_seed(5)
        moves = []
        for layer in range(5):
            kl, gain = torch.rand(2, 2, generator=random).tolist()
            moves += [Move(layer, 0.1, -0.1 * kl[0], -0.02 * gain[0])]
            moves += [Move(layer, 0.3, 0.1 * kl[1], 0.02 * gain[1])]
        chosen = fill(moves, kl_left)
        assert len({move.layer for move in chosen}) == len(chosen)
        kl, sparsity = sum(m.kl for m in chosen), sum(m.sparsity for m in chosen)
        assert kl <= kl_left
        options = [(None, *(m for m in moves if m.layer == layer)) for layer in range(5)]
        for combination in itertools.product(*options):
            made = [move for move in combination if move is not None]
            if sum(m.kl for m in made) <= kl:
                assert sum(m.sparsity for m in made) <= sparsity + 1e-12

    @pytest.mark.parametrize(
        "allowance",
        [Allowance(0.02), Allowance(0.3), Allowance(10.0, 0.005)],
        ids=["kl", "more", "ppl"],
    )
    def test_it_stays_within_its_bounds_and_gains(
        self, pair: tuple[Llama, Llama], allowance: Allowance
    ) -> None:
        student, teacher = pair
        _, tried = search_threshold(student, teacher, self.DOCUMENTS, allowance, [0.0, 0.2, 0.4], 3)
        search = LayerSearch(student, teacher, self.DOCUMENTS, allowance, tried, 3)
        thresholds = search.run(max_rounds=4)
        found = compare(student, teacher, self.DOCUMENTS, 3)  # the student was left with them
        assert found == search.quality
        assert allowance.permits(found, tried[0][1])
        sparsities = [quality.sparsity for _, quality in search.kept]
        assert sparsities == sorted(set(sparsities))
        assert len(sparsities) > 1
        assert search.kept[-1][0] == thresholds

    def test_no_allowance_no_change(self, pair: tuple[Llama, Llama]) -> None:
        student, teacher = pair
        never = Allowance(-1.0)
        _, tried = search_threshold(student, teacher, self.DOCUMENTS, never, [0.1, 0.2])
        search = LayerSearch(student, teacher, self.DOCUMENTS, never, tried)
        assert search.run() == (0.1, 0.1, 0.1)

    def test_spread_takes_documents_from_everywhere(self) -> None:
        documents = [[n] * 10 for n in range(20)]
        chosen = spread(documents, 50)
        assert [d[0] for d in chosen] == [0, 4, 8, 12, 16]
        assert spread(documents, 1) == documents[:1]

    def test_the_command_writes_a_model_that_everyone_reads(
        self, make_tiny_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "model"
        shutil.copytree(make_tiny_model(), folder)
        data = tmp_path / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": word * 9}) + "\n" for word in ("abc", "defg")))
        before = fingerprint(folder)
        command = ["prosparse", "threshold", str(folder), "--data", str(data), "--write"]
        command += ["--dense", str(make_tiny_model(hidden_act="silu")), "--candidates", "0,0.2"]
        assert main([*command, "--max-kl-increase", "0.02", "--per-layer"]) == 0
        written = json.loads((folder / "config.json").read_text())["hidden_act_param"]
        assert capsys.readouterr().out.splitlines()[-1] == str(written)
        assert len(written) == 3
        assert ModelConfig.from_folder(folder).thresholds == tuple(written)
        assert fingerprint(folder) != before
        dense = str(make_tiny_model(hidden_act="silu"))
        assert main(["prosparse", "threshold", dense, "--dense", dense, "--data", str(data)]) == 1
        assert "needs a ReLU model" in capsys.readouterr().err
