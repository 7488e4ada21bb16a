"""Modes of an engine and of a request, and predictors that do not fit."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny

import pytest
import torch

from predictor import PredictorMismatch, PredictorSet
from predictor.checkpoint import PredictorCorrupted
from predictor.kinds import GateCopy
from runtime import Request
from runtime.build import predictors_pay, resolve_mode
from runtime.config import ModelConfig
from runtime.errors import InvalidConfig, InvalidRequest, UnsupportedModel
from tests.engine.support import GREEDY, MODES, Receiver

MakeModel = Callable[..., Path]


def test_modes(make_engine) -> None:
    answers = {}
    for mode in MODES:
        engine = make_engine(mode=mode)
        prompts = torch.randint(0, 256, (8, 6), generator=torch.Generator().manual_seed(1))
        answers[mode] = [[e.token_id for e in engine.generate(p, GREEDY)] for p in prompts.tolist()]
    assert answers["exact"] == answers["dense"]
    same = sum(a == b for a, b in zip(answers["predicted"], answers["dense"], strict=True))
    assert 4 <= same <= 8  # a predictor that is nearly, not quite, an oracle


def test_requests_have_modes_of_their_own(make_engine) -> None:
    """In one batch each gets what an engine of its mode gives it alone."""
    prompts = torch.randint(0, 256, (9, 6), generator=torch.Generator().manual_seed(1)).tolist()
    expected = {
        mode: [[e.token_id for e in make_engine(mode=mode).generate(p, GREEDY)] for p in prompts]
        for mode in MODES
    }
    assert expected["predicted"] != expected["dense"]
    engine, receiver = make_engine(mode="dense"), Receiver()
    modes = ["predicted", "exact", None] * 3
    for n, mode in enumerate(modes):
        engine.submit(Request(f"r{n}", tuple(prompts[n]), GREEDY, mode=mode), receiver)
    engine.start()
    receiver.wait(9)
    for n, mode in enumerate(modes):
        assert receiver.tokens(f"r{n}") == expected[mode or "dense"][n]
        assert {e.usage.mode for e in receiver.events[f"r{n}"]} == {mode or "dense"}


def test_a_mode_or_audit_that_cannot_be_is_refused(make_engine, make_tiny_model: MakeModel) -> None:
    bare, silu = make_engine(make_tiny_model()), make_engine(make_tiny_model(hidden_act="silu"))
    for engine, wanted, param, words in (
        (bare, {"mode": "predicted"}, "sparsity.mode", "train-predictors"),
        (silu, {"mode": "exact"}, "sparsity.mode", "only mode dense"),
        (silu, {"audit": True}, "sparsity.audit", "nothing to audit"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            engine.submit(Request("r", (1, 2), GREEDY, **wanted), lambda e: None)
        assert caught.value.param == param


def test_mode_auto(make_engine, make_tiny_model: MakeModel) -> None:
    assert make_engine().mode == "predicted"
    bare = make_engine(make_tiny_model(hidden_act_param=0.2), audit_rate=1.0)
    assert bare.mode == "exact"
    bare.generate((1, 2), GREEDY)
    mean = bare.report()["mean"]
    assert mean["natural_sparsity"] > 0.3
    assert (mean["recall"], mean["predicted_sparsity"], mean["precision"]) == (None, None, None)
    silu = make_engine(make_tiny_model(hidden_act="silu"), audit_rate=1.0)
    assert silu.mode == "dense"
    assert len(silu.generate((1, 2), GREEDY)) == 12
    assert silu.report()["mean"]["natural_sparsity"] is None


def test_modes_that_cannot_be_are_refused(make_engine, make_tiny_model: MakeModel) -> None:
    with pytest.raises(InvalidConfig, match="train-predictors"):
        make_engine(make_tiny_model(), mode="predicted")
    for mode in ("exact", "predicted"):
        with pytest.raises(UnsupportedModel, match="hotneuron prosparse"):
            make_engine(make_tiny_model(hidden_act="silu"), mode=mode)


def test_damaged_and_foreign_predictors(
    make_engine, folder: Path, make_tiny_model: MakeModel, tmp_path: Path, caplog
) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    path = damaged / "sparsity" / "predictors.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    foreign = Path(shutil.copytree(make_tiny_model(seed=5), tmp_path / "foreign"))
    shutil.copytree(folder / "sparsity", foreign / "sparsity")
    for broken, error in ((damaged, PredictorCorrupted), (foreign, PredictorMismatch)):
        for mode in ("auto", "predicted"):
            with pytest.raises(error, match="train-predictors"):
                make_engine(broken, mode=mode)
        with caplog.at_level(logging.WARNING):
            engine = make_engine(broken, mode="exact", audit_rate=1.0)
        assert "without predictors" in caplog.text
        engine.generate((1, 2), GREEDY)
        assert engine.report()["mean"]["recall"] is None
        assert "train-predictors" in engine.report()["predictors"]


def test_resolve_mode_is_pure(tiny: Tiny) -> None:
    sparse = ModelConfig.from_hf(tiny.config())
    dense = ModelConfig.from_hf(tiny.config(hidden_act="silu"))
    assert resolve_mode("auto", sparse, True) == "predicted"
    assert resolve_mode("auto", sparse, False) == "exact"
    assert resolve_mode("auto", dense, False) == "dense"
    assert resolve_mode("dense", sparse, True) == "dense"
    assert resolve_mode("auto", sparse, True, predictors_pay=False) == "exact"
    assert resolve_mode("predicted", sparse, True, predictors_pay=False) == "predicted"


@pytest.mark.parametrize(
    ("kind_bits", "pays"), [(4, [True, True, False]), (8, [True, False, False])]
)
def test_auto_leaves_out_copies_of_the_gate_that_are_as_large(
    kind_bits: int, pays: list[bool]
) -> None:
    predictors = PredictorSet([GateCopy.of(torch.randn(5, 64), kind_bits, 0.2)])
    assert [predictors_pay(predictors, weights) for weights in ("auto", "int8", "int4")] == pays
