"""Plans what lives on the accelerator: activation counts, budget and costs to a `Placement`.

A pure function of its arguments. Modelled seconds of one decoded token, layer by layer:
    on the accelerator  layer_s + attention there + max(hot, cold + sync_s), both at once
    all neurons hot     layer_s + attention there + hot
    on the host         attention there + cold, and sync_s before and behind a run of such layers
hot and cold are the rows that a token reads of each neuron, at each side's bytes per second. All
layers together take no less than streaming the streamed layers' attention weights does.
Solved as a MILP (HiGHS): blocks of neurons are continuous, where a layer attends is binary. A
greedy plan and the plans that split nothing are held against it, and the best is the answer.
Dimensions: L layers, F neurons (a layer's hottest first), B blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .placement import Home, Placement
from .workload import MachineCosts, Workload

NUM_BLOCKS = 16  # per layer: the plan's grain is F / 16 neurons
MIN_HOT = 64  # neurons: fewer are not worth a kernel's start
SOLVER_LIMITS = {"time_limit": 10.0, "mip_rel_gap": 5e-3}


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement with what it is expected to take."""

    placement: Placement
    seconds: float  # of one token
    bytes: int  # of the budget, without what is fixed


class Planner:
    """The model of one machine and workload, and the plans within `budget_bytes` (weights,
    predictors, keys and values; not what is there in any case)."""

    def __init__(self, workload: Workload, costs: MachineCosts, budget_bytes: int) -> None:
        w = self.workload = workload
        self.costs, self.budget = costs, budget_bytes
        self._hot_s_LF = w.read_bytes_LF(w.hot_is_sparse) / costs.hot_bytes_per_s
        self._cold_s_LF = w.read_bytes_LF(True) / costs.cold_bytes_per_s
        zeros_L1 = np.zeros((w.num_layers, 1))
        self._hot_until = np.hstack([zeros_L1, self._hot_s_LF.cumsum(axis=1)])
        self._cold_until = np.hstack([zeros_L1, self._cold_s_LF.cumsum(axis=1)])
        reads_predictor = w.predictor_bytes if w.mode == "predicted" else 0
        self._attend_s = (
            w.attention_bytes + reads_predictor
        ) / costs.hot_bytes_per_s + costs.layer_s
        self._host_attend_s = (w.attention_bytes + reads_predictor) / costs.host_bytes_per_s
        self._stream_s = w.attention_bytes / costs.link_bytes_per_s

    # -- the model --------------------------------------------------------------------------------

    def layer_seconds(self, layer: int, num_hot: int, home: Home) -> float:
        """Modelled time of one layer for one token."""
        F = self.workload.num_neurons
        cold = float(self._cold_until[layer, F] - self._cold_until[layer, num_hot])
        if home == "host":
            return self._host_attend_s + cold
        hot = float(self._hot_until[layer, num_hot])
        if num_hot == F:
            return self._attend_s + hot
        return self._attend_s + max(hot, cold + self.costs.sync_s)

    def seconds(self, num_hot_L: tuple[int, ...], home_L: tuple[Home, ...]) -> float:
        """Modelled time of one token, the head included."""
        layers = sum(
            self.layer_seconds(l, n, home)
            for l, (n, home) in enumerate(zip(num_hot_L, home_L, strict=True))
        )
        is_host = [home == "host" for home in home_L]
        runs = sum(b and not a for a, b in zip([False, *is_host], is_host, strict=False))
        layers += 2 * runs * self.costs.sync_s
        layers = max(layers, home_L.count("streamed") * self._stream_s)
        return layers + self.workload.head_bytes / self.costs.hot_bytes_per_s

    def cpu_seconds(self) -> float:
        """Modelled time of one token with no accelerator at all."""
        without_head = self.all_host().seconds - 2 * self.costs.sync_s
        head = self.workload.head_bytes
        return without_head + head / self.costs.host_bytes_per_s - head / self.costs.hot_bytes_per_s

    def bytes(self, num_hot_L: tuple[int, ...], home_L: tuple[Home, ...]) -> int:
        """What a plan takes of the budget."""
        w = self.workload
        resident = home_L.count("accelerator") + ("streamed" in home_L)  # one slot for all streamed
        attended = len(home_L) - home_L.count("host")
        return (
            resident * w.attention_bytes
            + attended * (w.kv_bytes + w.predictor_bytes)
            + sum(num_hot_L) * w.neuron_bytes
        )

    def plan_of(self, num_hot_L: tuple[int, ...], home_L: tuple[Home, ...]) -> Plan:
        placement = Placement(self.workload.order_LF, num_hot_L, home_L)
        return Plan(placement, self.seconds(num_hot_L, home_L), self.bytes(num_hot_L, home_L))

    def plan_for(self, placement: Placement) -> Plan:
        """A placement that was made before, in this model."""
        other = replace(self.workload, given_order_LF=placement.order_LF)
        planner = Planner(other, self.costs, self.budget)
        numbers = placement.num_hot_L, placement.home_L
        return Plan(placement, planner.seconds(*numbers), planner.bytes(*numbers))

    # -- plans ------------------------------------------------------------------------------------

    def best(self) -> Plan:
        """The fastest of the solver's plan, the greedy one and those that split nothing."""
        plans = [self.solved(), self.greedy(), self.all_host(), self.split_by_layers()]
        whole = self.all_accelerator()
        return min((p for p in (*plans, whole) if p is not None), key=lambda plan: plan.seconds)

    def all_host(self) -> Plan:
        L = self.workload.num_layers
        return self.plan_of((0,) * L, _homes(0, L))

    def all_accelerator(self) -> Plan | None:
        """None: it does not fit."""
        L, F = self.workload.num_layers, self.workload.num_neurons
        plan = self.plan_of((F,) * L, _homes(L, 0))
        return plan if plan.bytes <= self.budget else None

    def split_by_layers(self) -> Plan:
        """As many whole layers on the accelerator as fit: what is done without hot neurons."""
        w, L, F = self.workload, self.workload.num_layers, self.workload.num_neurons
        layer = w.attention_bytes + w.kv_bytes + w.predictor_bytes + F * w.neuron_bytes
        n = max(0, min(L, self.budget // layer))
        return self.plan_of((F,) * n + (0,) * (L - n), _homes(n, L - n))

    def greedy(self) -> Plan:
        """Attention of as many layers as fit, then the most active neurons of these layers; blind
        to all costs but bytes."""
        w, L, F = self.workload, self.workload.num_layers, self.workload.num_neurons
        attended = w.attention_bytes + w.kv_bytes + w.predictor_bytes
        n = L if attended == 0 else max(0, min(L, self.budget // attended))
        max_hot = max(0, self.budget - n * attended) // w.neuron_bytes
        best = np.argsort(-w.sorted_LF[:n], axis=None, kind="stable")[:max_hot]
        counts = np.bincount(best // F, minlength=L).tolist() if n else [0] * L
        return self.plan_of(tuple(counts), _homes(n, L - n))

    def solved(self) -> Plan | None:
        """The MILP's plan; None if the solver finds none in its time."""
        problem = _Problem(self)
        answer = problem.solve()
        if answer is None:
            return None
        plan = self.plan_of(answer[0], _spread(answer[1]))
        assert plan.bytes <= max(0, self.budget), (plan.bytes, self.budget)
        return plan


def _homes(num_accelerator: int, num_host: int) -> tuple[Home, ...]:
    accelerator: tuple[Home, ...] = ("accelerator",)
    host: tuple[Home, ...] = ("host",)
    return accelerator * num_accelerator + host * num_host


def _spread(home_L: tuple[Home, ...]) -> tuple[Home, ...]:
    """The same plan with the streamed layers evenly among those on the accelerator: what each one
    waits for is copied while the layers before it compute."""
    attended = [l for l, home in enumerate(home_L) if home != "host"]
    num_streamed = home_L.count("streamed")
    streamed = {attended[(2 * i + 1) * len(attended) // (2 * num_streamed)]
                for i in range(num_streamed)}  # fmt: skip
    homes: list[Home] = []
    for l, home in enumerate(home_L):
        homes.append(home if home == "host" else "streamed" if l in streamed else "accelerator")
    return tuple(homes)


class _Problem:
    """The MILP. Columns: hot share x[l, b] of each block, then per layer `on` (attends on the
    accelerator), `streamed`, `any_hot`, `all_hot` and `begins` (a run of host layers), the layer's
    seconds, and at last the slot of the streamed and the token's seconds."""

    def __init__(self, planner: Planner) -> None:
        self._planner, w = planner, planner.workload
        L, F = w.num_layers, w.num_neurons
        edges = np.linspace(0, F, min(NUM_BLOCKS, F) + 1).astype(int)
        self._size_B = np.diff(edges)
        self._hot_LB = np.add.reduceat(planner._hot_s_LF, edges[:-1], axis=1)
        self._cold_LB = np.add.reduceat(planner._cold_s_LF, edges[:-1], axis=1)
        B = len(self._size_B)
        names = ("on", "streamed", "any_hot", "all_hot", "begins", "seconds")
        self._column = {name: L * B + i * L for i, name in enumerate(names)}
        self._slot, self._total = L * B + len(names) * L, L * B + len(names) * L + 1
        self._num_columns = self._total + 1
        # in units near 1
        self._unit = max(planner.all_host().seconds / L, 1e-12)
        self._rows: list[tuple[dict[int, float], float, float]] = []

    def solve(self) -> tuple[tuple[int, ...], tuple[Home, ...]] | None:
        L, B = self._hot_LB.shape
        for layer in range(L):
            self._rows.extend(self._layer(layer))
        self._rows.extend(self._whole())
        objective = np.zeros(self._num_columns)
        objective[self._total] = 1.0
        integrality = np.zeros(self._num_columns)
        integrality[self._column["on"] : self._column["seconds"]] = 1
        integrality[self._slot] = 1
        upper = np.ones(self._num_columns)
        upper[self._column["seconds"] : self._column["seconds"] + L] = np.inf
        upper[self._total] = np.inf
        result = milp(
            objective,
            constraints=self._constraints(),
            integrality=integrality,
            bounds=Bounds(0, upper),
            options=SOLVER_LIMITS,
        )
        if result.x is None:
            return None
        on_L, streamed_L = (self._of(result.x, name) > 0.5 for name in ("on", "streamed"))
        hot_L = np.floor(result.x[: L * B].reshape(L, B) @ self._size_B + 1e-6).astype(int)
        homes: list[Home] = []
        for on, streamed in zip(on_L, streamed_L, strict=True):
            homes.append("host" if not on else "streamed" if streamed else "accelerator")
        return tuple((hot_L * on_L).tolist()), tuple(homes)

    def _of(self, x: np.ndarray, name: str) -> np.ndarray:
        first = self._column[name]
        return x[first : first + len(self._hot_LB)]

    def _constraints(self) -> LinearConstraint:
        values, columns, starts = [], [], [0]
        for terms, _, _ in self._rows:
            values += list(terms.values())
            columns += list(terms)
            starts.append(len(values))
        shape = (len(self._rows), self._num_columns)
        matrix = csr_array((values, columns, starts), shape=shape)
        return LinearConstraint(matrix, [r[1] for r in self._rows], [r[2] for r in self._rows])

    def _layer(self, l: int) -> Iterator[tuple[dict[int, float], float, float]]:
        p, unit = self._planner, self._unit
        B = len(self._size_B)
        F = p.workload.num_neurons
        x = range(l * B, (l + 1) * B)
        on, streamed, any_hot, all_hot, begins, seconds = (c + l for c in self._column.values())
        sync, attend, host = p.costs.sync_s / unit, p._attend_s / unit, p._host_attend_s / unit
        sizes = dict(zip(x, self._size_B.astype(float), strict=True))
        hot = {v: -s for v, s in zip(x, self._hot_LB[l] / unit, strict=True)}
        # seconds >= attend + hot, on the accelerator
        yield {seconds: 1.0, on: -attend} | hot, 0, np.inf
        # seconds >= attend + sync + cold there (no sync if all is hot), attend + cold on the host
        cold = dict(zip(x, self._cold_LB[l] / unit, strict=True))
        terms = {seconds: 1.0, on: host - attend - sync, all_hot: sync} | cold
        yield terms, host + float(self._cold_LB[l].sum()) / unit, np.inf
        yield {streamed: 1.0, on: -1.0}, -np.inf, 0
        yield {streamed: 1.0, self._slot: -1.0}, -np.inf, 0
        yield {any_hot: 1.0, on: -1.0}, -np.inf, 0
        # none are hot unless any_hot, and then at least MIN_HOT; all are if all_hot
        yield {any_hot: -float(F)} | sizes, -np.inf, 0
        yield {any_hot: -float(min(MIN_HOT, F))} | sizes, 0, np.inf
        yield {all_hot: -float(F)} | sizes, 0, np.inf
        # a run of host layers begins here
        before = {} if l == 0 else {on - 1: -1.0}
        yield {begins: 1.0, on: 1.0} | before, 1.0 if l == 0 else 0.0, np.inf

    def _whole(self) -> Iterator[tuple[dict[int, float], float, float]]:
        p, w, unit = self._planner, self._planner.workload, self._unit
        L, B = self._hot_LB.shape
        layers = range(L)
        column = self._column
        terms = {self._total: 1.0}
        terms |= {column["seconds"] + l: -1.0 for l in layers}
        terms |= {column["begins"] + l: -2 * p.costs.sync_s / unit for l in layers}
        yield terms, 0, np.inf
        stream = {column["streamed"] + l: -p._stream_s / unit for l in layers}
        yield {self._total: 1.0} | stream, 0, np.inf
        # memory, in units of one layer's attention
        scale = 1.0 / max(1, w.attention_bytes)
        attended = (w.attention_bytes + w.kv_bytes + w.predictor_bytes) * scale
        terms = {column["on"] + l: attended for l in layers}
        terms |= {column["streamed"] + l: -w.attention_bytes * scale for l in layers}
        terms[self._slot] = w.attention_bytes * scale
        for l in layers:
            for b, size in enumerate(self._size_B):
                terms[l * B + b] = float(size) * w.neuron_bytes * scale
        yield terms, -np.inf, max(0, p.budget) * scale
