"""Plans: the budget holds, costs matter, hot comes first, the solver beats greedy, files round."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import PlacementError
from runtime.placement import (
    MachineCosts,
    Placement,
    all_cold,
    layer_seconds,
    placement_seconds,
    plan_placement,
)

BYTES = 3072
NUM_TOKENS = 1000
CHEAP_SYNC = MachineCosts(hot_neuron_s=1e-9, cold_neuron_s=50e-9, sync_s=1e-9)


def skewed_counts(L: int, F: int, seed: int = 0) -> Tensor:
    """Few neurons fire often, most rarely, in another random order in every layer."""
    generator = torch.Generator().manual_seed(seed)
    base_F = (NUM_TOKENS * (torch.arange(1, F + 1).float() / F) ** 4).long()
    return torch.stack([base_F[torch.randperm(F, generator=generator)] for _ in range(L)])


def plan(counts_LF: Tensor, budget_neurons: int, costs: MachineCosts) -> Placement:
    return plan_placement(counts_LF, NUM_TOKENS, BYTES, budget_neurons * BYTES, costs)


def greedy(counts_LF: Tensor, max_hot: int, costs: MachineCosts) -> Placement:
    """The most active neurons of all layers first, while the budget lasts; blind to costs."""
    L, F = counts_LF.shape
    best = counts_LF.flatten().argsort(descending=True, stable=True)[:max_hot]
    num_hot = torch.bincount(best // F, minlength=L).tolist()
    return Placement(counts_LF.argsort(dim=1, descending=True, stable=True), tuple(num_hot))


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(0, 700),
    hot=st.floats(1e-10, 1e-7),
    cold=st.floats(1e-9, 1e-6),
    sync=st.floats(0, 1e-4),
    seed=st.integers(0, 5),
)
def test_properties(budget: int, hot: float, cold: float, sync: float, seed: int) -> None:
    counts_LF = skewed_counts(3, 200, seed)
    costs = MachineCosts(hot, cold, sync)
    placement = plan(counts_LF, budget, costs)
    assert sum(placement.num_hot_L) <= budget
    frequency_LF = counts_LF / NUM_TOKENS
    for l, num_hot in enumerate(placement.num_hot_L):
        ordered_F = counts_LF[l][placement.order_LF[l]]
        assert torch.equal(ordered_F, ordered_F.sort(descending=True).values)
        row = (ordered_F / NUM_TOKENS).numpy()
        assert layer_seconds(row, num_hot, costs) <= layer_seconds(row, 0, costs)
    seconds = placement_seconds(frequency_LF, placement, costs)
    assert seconds <= placement_seconds(frequency_LF, all_cold(3, 200), costs) * (1 + 1e-9)
    # one block (F / 32 neurons) per layer is lost to rounding at most, plus the solver's gap
    best_greedy = placement_seconds(frequency_LF, greedy(counts_LF, budget, costs), costs)
    slack = 3 * (200 / 32 + 1) * (hot + cold)
    assert seconds <= best_greedy * 1.001 + slack


def test_all_fits() -> None:
    """Whole layers need no sync; only where that is free does a split of what fits pay."""
    counts_LF = skewed_counts(4, 100)
    costs = MachineCosts(1e-9, 50e-9, sync_s=1e-6)
    assert plan(counts_LF, 400, costs).num_hot_L == (100,) * 4
    assert plan(counts_LF, 10**9, costs).num_hot_L == (100,) * 4


def test_no_budget_is_all_cold() -> None:
    assert plan(skewed_counts(4, 100), 0, CHEAP_SYNC).num_hot_L == (0,) * 4
    assert all_cold(2, 5).num_hot_L == (0, 0)
    assert torch.equal(all_cold(2, 5).order_LF, torch.arange(5).repeat(2, 1))


def test_costs_change_the_plan() -> None:
    counts_LF = skewed_counts(4, 320)
    cheap = plan(counts_LF, 400, CHEAP_SYNC)
    assert all(0 < n < 320 for n in cheap.num_hot_L), "a cheap sync: every layer is split"
    dear = plan(counts_LF, 400, MachineCosts(1e-9, 50e-9, sync_s=2.5e-6))
    assert sorted(dear.num_hot_L)[:2] == [0, 0], "a dear sync: whole layers, or nothing"
    assert max(dear.num_hot_L) == 320
    hopeless = plan(counts_LF, 400, MachineCosts(hot_neuron_s=1e-6, cold_neuron_s=1e-9, sync_s=0.0))
    assert sum(hopeless.num_hot_L) < 20, "a slow accelerator: nearly nothing is worth moving"


def test_a_layer_pays_for_its_sync_or_stays_cold() -> None:
    counts_LF = skewed_counts(6, 320)
    costs = MachineCosts(1e-9, 50e-9, sync_s=1e-6)
    for budget in (40, 200, 500, 900):
        placement = plan(counts_LF, budget, costs)
        for l, n in enumerate(placement.num_hot_L):
            row = (counts_LF[l][placement.order_LF[l]] / NUM_TOKENS).numpy()
            assert n == 0 or layer_seconds(row, n, costs) < layer_seconds(row, 0, costs)


def test_solver_beats_greedy_where_the_sync_is_dear() -> None:
    counts_LF = skewed_counts(4, 320)
    frequency_LF = counts_LF / NUM_TOKENS
    costs = MachineCosts(1e-9, 50e-9, sync_s=2.5e-6)
    solved = placement_seconds(frequency_LF, plan(counts_LF, 400, costs), costs)
    blind = placement_seconds(frequency_LF, greedy(counts_LF, 400, costs), costs)
    assert solved < 0.95 * blind


def test_more_than_ten_layers_keep_their_own_neurons() -> None:
    """Layer l's hot neurons are those that fire in layer l, for two-digit l too."""
    L, F = 13, 96
    counts_LF = torch.ones(L, F, dtype=torch.int64)
    for l in range(L):
        counts_LF[l, [l, l + 20, l + 40]] = NUM_TOKENS - l
    placement = plan(counts_LF, 3 * L, CHEAP_SYNC)
    assert placement.num_hot_L == (3,) * L
    for l in range(L):
        assert placement.order_LF[l, :3].tolist() == [l, l + 20, l + 40]


def test_hot_layers_get_more() -> None:
    counts_LF = skewed_counts(2, 320)
    counts_LF[1] //= 10
    busy, idle = plan(counts_LF, 160, CHEAP_SYNC).num_hot_L
    assert busy > idle


def test_round_trip_and_refusals(tmp_path: Path) -> None:
    placement = plan(skewed_counts(3, 64), 60, CHEAP_SYNC)
    path = tmp_path / "plans" / "placement.safetensors"
    placement.save(path, fingerprint="abc")
    loaded = Placement.load(path, fingerprint="abc")
    assert torch.equal(loaded.order_LF, placement.order_LF)
    assert loaded.num_hot_L == placement.num_hot_L
    with pytest.raises(PlacementError, match=r"abc.*xyz.*hotneuron place"):
        Placement.load(path, fingerprint="xyz")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PlacementError, match="not a readable placement"):
        Placement.load(path, fingerprint="abc")
    with pytest.raises(PlacementError, match="not a readable placement"):
        Placement.load(tmp_path / "none", fingerprint="abc")
    with pytest.raises(PlacementError, match="hotneuron place"):
        placement.check_fits(3, 65)


def test_malformed_placements_are_refused() -> None:
    order_LF = torch.arange(4).repeat(2, 1)
    with pytest.raises(PlacementError, match="permutation"):
        Placement(torch.zeros(2, 4, dtype=torch.int64), (0, 0))
    with pytest.raises(PlacementError, match="from 0 to 4"):
        Placement(order_LF, (0, 5))
    with pytest.raises(PlacementError, match="one count per layer"):
        Placement(order_LF, (0,))


def test_estimated_costs_follow_bandwidth() -> None:
    costs = MachineCosts.estimate(BYTES, hot_bytes_per_s=100e9, cold_bytes_per_s=10e9, sync_s=1e-5)
    assert costs.cold_neuron_s == pytest.approx(10 * costs.hot_neuron_s)
    assert not costs.is_measured
