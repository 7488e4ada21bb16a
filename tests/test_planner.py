"""Plans: the budget holds, costs matter, hot comes first, the solver is no worse than greedy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.placement import Placement
from runtime.planner import SOLVER_LIMITS, Planner
from runtime.workload import MachineCosts, Workload

ROW = 1024
NEURON = 3 * ROW
ATTENTION = 100 * ROW
CHEAP = MachineCosts(
    hot_bytes_per_s=1e12,
    cold_bytes_per_s=2e10,
    host_bytes_per_s=2e10,
    link_bytes_per_s=1e8,  # so slow that nothing is streamed
    sync_s=1e-9,
    layer_s=1e-9,
)


def skewed(L: int, F: int, seed: int = 0) -> Tensor:
    """Few neurons fire often, most rarely, in another random order in every layer."""
    generator = torch.Generator().manual_seed(seed)
    base_F = (torch.arange(1, F + 1).float() / F) ** 4
    return torch.stack([base_F[torch.randperm(F, generator=generator)] for _ in range(L)])


def workload(L: int, F: int, seed: int = 0, **changes: object) -> Workload:
    return replace(Workload(skewed(L, F, seed), ROW, ATTENTION), **changes)


def planner(work: Workload, neurons: float, costs: MachineCosts = CHEAP) -> Planner:
    """With a budget for all attention and so many neurons."""
    return Planner(work, costs, int(work.num_layers * ATTENTION + neurons * NEURON))


def layer_of(p: Planner, plan_hot: int, layer: int = 0) -> float:
    return p.layer_seconds(layer, plan_hot, "accelerator")


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(0, 3 * 300 * NEURON),
    rates=st.tuples(*[st.floats(1e8, 1e12)] * 4),
    sync=st.floats(0, 1e-4),
    mode=st.sampled_from(["dense", "exact", "predicted"]),
    hot_is_sparse=st.booleans(),
    kv_bytes=st.integers(0, 50 * ROW),
    seed=st.integers(0, 5),
)
def test_properties(
    budget: int, rates: tuple[float, ...], sync: float, mode: str, hot_is_sparse: bool,
    kv_bytes: int, seed: int,
) -> None:  # fmt: skip
    work = workload(3, 200, seed, mode=mode, hot_is_sparse=hot_is_sparse, kv_bytes=kv_bytes)
    p = Planner(work, MachineCosts(*rates, sync), budget)
    plan = p.best()
    placement = plan.placement
    assert plan.bytes <= budget
    for l in range(3):
        ordered_F = work.frequency_LF[l][placement.order_LF[l]]
        assert torch.equal(ordered_F, ordered_F.sort(descending=True).values)
    others = [p.greedy(), p.all_host(), p.split_by_layers(), p.all_accelerator(), p.solved()]
    for other in others:
        if other is not None:
            assert other.bytes <= max(budget, 0)
            assert plan.seconds <= other.seconds
    assert p.plan_for(placement).seconds == pytest.approx(plan.seconds)


@pytest.mark.parametrize("neurons", [30, 150, 400, 900])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_solver_is_no_worse_than_greedy(neurons: int, seed: int) -> None:
    """But for its own gap and for what rounding blocks to neurons costs."""
    work = workload(4, 320, seed)
    p = planner(work, neurons)
    solved = p.solved()
    assert solved is not None
    one_neuron = NEURON / CHEAP.cold_bytes_per_s
    slack = SOLVER_LIMITS["mip_rel_gap"] * p.all_host().seconds + 4 * 20 * one_neuron
    assert solved.seconds <= p.greedy().seconds + slack


def test_the_solver_beats_greedy_where_the_sync_is_dear() -> None:
    work = workload(4, 320)
    p = planner(work, 400, replace(CHEAP, sync_s=1e-4))
    solved = p.solved()
    assert solved is not None
    assert solved.seconds < 0.95 * p.greedy().seconds


def test_all_fits() -> None:
    work = workload(4, 100)
    p = planner(work, 400, replace(CHEAP, sync_s=1e-5))
    assert p.best().placement.num_hot_L == (100,) * 4
    assert p.all_accelerator() is not None
    assert planner(work, 399).all_accelerator() is None


def test_no_budget_leaves_all_to_the_host() -> None:
    for budget in (0, -1):
        plan = Planner(workload(4, 100), CHEAP, budget).best()
        assert plan.placement.home_L == ("host",) * 4
        assert plan.placement.num_hot_L == (0,) * 4


def test_costs_change_the_plan() -> None:
    work = workload(4, 320)
    cheap = planner(work, 400).best().placement
    assert all(0 < n < 320 for n in cheap.num_hot_L), "a cheap sync: every layer is split"
    dear = planner(work, 400, replace(CHEAP, sync_s=1e-4)).best().placement
    assert set(dear.num_hot_L) <= {0, 320}, "a dear sync: whole layers, or nothing"
    assert 320 in dear.num_hot_L
    slow = MachineCosts(1e8, 2e10, 2e10, 1e8, 0.0)
    hopeless = planner(work, 400, slow).best().placement
    assert hopeless.home_L == ("host",) * 4, "a slow accelerator: nothing is worth moving"


def test_hot_neurons_come_in_blocks_worth_a_kernel() -> None:
    for neurons in (1, 30, 63, 70):
        solved = planner(workload(4, 320), neurons).solved()
        assert solved is not None
        assert all(n == 0 or n >= 64 for n in solved.placement.num_hot_L)


def test_attention_is_streamed_where_the_link_has_time() -> None:
    """Half the attention fits; a fast link lends the rest a slot, evenly among the others."""
    work = workload(16, 320)
    fast = replace(CHEAP, link_bytes_per_s=5e10, sync_s=1e-6)
    plan = Planner(work, fast, 8 * ATTENTION).best()
    homes = plan.placement.home_L
    assert homes.count("streamed") >= 4
    streamed = [l for l, home in enumerate(homes) if home == "streamed"]
    assert min(np.diff(streamed)) >= 16 // (len(streamed) + 2)
    assert plan.seconds >= len(streamed) * ATTENTION / fast.link_bytes_per_s
    slow = Planner(work, replace(fast, link_bytes_per_s=1e8), 8 * ATTENTION).best()
    assert slow.placement.home_L.count("streamed") == 0
    assert plan.seconds < slow.seconds


def test_more_than_ten_layers_keep_their_own_neurons() -> None:
    """Layer l's hot neurons are those that fire in layer l, for two-digit l too."""
    L, F = 13, 320
    frequency_LF = torch.full((L, F), 0.001)
    for l in range(L):
        frequency_LF[l, l : l + 64] = 0.9
    placement = planner(Workload(frequency_LF, ROW, ATTENTION), 64 * L).best().placement
    for l in range(L):
        hot = set(placement.order_LF[l, : placement.num_hot_L[l]].tolist())
        assert len(hot & set(range(l, l + 64))) >= 60


def test_busy_layers_get_more() -> None:
    frequency_LF = skewed(2, 320)
    frequency_LF[1] /= 10
    busy, idle = planner(Workload(frequency_LF, ROW, ATTENTION), 200).best().placement.num_hot_L
    assert busy > idle


def test_what_a_mode_reads() -> None:
    frequency_LF = torch.tensor([[0.5, 0.1]])
    work = Workload(frequency_LF, ROW, ATTENTION, selected_per_active=2.0)
    rows = {
        "dense": [3.0, 3.0],
        "exact": [2.0, 1.2],
        "predicted": [2.0, 0.4],
    }
    for mode, expected in rows.items():
        read_LF = replace(work, mode=mode).read_bytes_LF(is_sparse=True)
        np.testing.assert_allclose(read_LF, np.array([expected]) * ROW, rtol=1e-6)
        assert (replace(work, mode=mode).read_bytes_LF(is_sparse=False) == NEURON).all()


def test_a_placement_in_another_order_is_judged_by_its_own() -> None:
    work = workload(2, 320)
    p = planner(work, 200)
    best = p.best().placement
    reverse = Placement(best.order_LF.flip(1), best.num_hot_L, best.home_L)
    assert p.plan_for(reverse).seconds > p.plan_for(best).seconds


def test_costs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        replace(CHEAP, cold_bytes_per_s=0.0)
