"""What a plan says it takes of the accelerator is what its tensors take; too little is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from predictor import ActivationProfile, fingerprint, load_predictors
from runtime.budget import Needs, ledger_of, planner_within
from runtime.config import ModelConfig
from runtime.errors import InvalidConfig
from runtime.hybrid import HybridFFN
from runtime.model import Model
from runtime.streaming import StreamedAttention
from runtime.workload import MachineCosts

MIB = 1 << 20
COSTS = MachineCosts(1e12, 2e10, 2e10, 2e10, 1e-7, 1e-7)


def needs_of(folder: Path, **changes: object) -> Needs:
    facts = {
        "config": ModelConfig.from_folder(folder),
        "dtype": torch.float32,
        "kv_tokens": 96,
        "max_context": 64,
        "max_batch": 4,
        "mode": "predicted",
        "predictors": load_predictors(folder / "sparsity", fingerprint=fingerprint(folder)),
    }
    return Needs(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_the_ledger_counts_the_tensors(
    make_sparse_model: Callable[..., Path], share: float
) -> None:
    """The CPU is the accelerator here: its side's tensors, counted one by one."""
    folder = make_sparse_model("gate", tie_word_embeddings=False, num_hidden_layers=6)
    needs = needs_of(folder)
    profile = ActivationProfile.load(folder / "sparsity" / "profile.safetensors")
    work = needs.workload(profile)
    whole = sum((work.attention_bytes, work.kv_bytes, work.predictor_bytes)) * 6
    whole += work.neuron_bytes * work.num_neurons * 6
    fixed = sum(needs.fixed_bytes().values())
    budget = int(1.02 * (fixed + share * whole))
    plan = planner_within(needs, work, COSTS, budget).best()
    ledger = ledger_of(needs, work, plan, budget)
    assert ledger.total <= budget
    model = Model.from_folder(
        folder, dtype="float32", kernels="cpu", predictors=needs.predictors,
        placement=plan.placement, max_context=64, max_batch=4,
    )  # fmt: skip
    entries = dict(ledger.entries)
    homes = plan.placement.home_L
    attended = [layer for layer, home in zip(model.layers, homes, strict=True) if home != "host"]
    resident = [
        layer for layer, home in zip(model.layers, homes, strict=True) if home == "accelerator"
    ]
    assert entries["attention"] == sum(
        layer.weights.qkv_OD.nbytes + layer.weights.out_DO.nbytes for layer in resident
    )
    slots = {id(l.attention._slot): l.attention._slot for l in attended
             if isinstance(l.attention, StreamedAttention)}  # fmt: skip
    assert entries["slot of streamed attention"] == sum(s._lent.nbytes for s in slots.values())
    assert entries["head"] == model._head.weight_VD.nbytes
    pool = model.new_cache(96).pool_BL2GTK
    assert entries["keys and values"] == pool.nbytes
    hot = 0
    for layer in attended:
        ffn = layer.ffn
        part = ffn.hot if isinstance(ffn, HybridFFN) else ffn if ffn.num_hot else None
        if part is not None:
            w = part.weights
            hot += w.gate_FD.nbytes + w.up_FD.nbytes + w.down_FD.nbytes
    assert entries["hot neurons"] == hot
    assert needs.predictors is not None
    assert entries["predictors"] == pytest.approx(
        len(attended) * needs.predictors.num_bytes / 6, rel=1e-3
    )
    exchanges = [l.ffn.exchange for l in attended if isinstance(l.ffn, HybridFFN)]
    if exchanges:
        assert exchanges[0].num_bytes <= entries["exchange"]


def test_a_budget_for_nothing_is_refused_with_the_least_that_does(
    make_sparse_model: Callable[..., Path],
) -> None:
    needs = needs_of(make_sparse_model("gate"))
    work = needs.workload(None)
    with pytest.raises(InvalidConfig, match=r"give --vram-budget (\d+)MiB or more") as error:
        planner_within(needs, work, COSTS, MIB)
    least = int(str(error.value).split("--vram-budget ")[1].split("MiB")[0])
    assert planner_within(needs, work, COSTS, least * MIB).best().bytes >= 0
    with pytest.raises(InvalidConfig, match="give --vram-budget"):
        planner_within(needs, work, COSTS, (least - 1) * MIB)


def test_a_profile_of_another_model_is_refused(make_sparse_model: Callable[..., Path]) -> None:
    needs = needs_of(make_sparse_model("gate"))
    other = ActivationProfile(torch.ones(3, 5, dtype=torch.int64), 1)
    with pytest.raises(InvalidConfig, match="record it again"):
        needs.workload(other)
