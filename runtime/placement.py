"""Plans which neurons live on the accelerator: counts, budget and machine costs to a `Placement`.

A pure function of its arguments; the loader applies the result and the layers only read it. A
placement is a permutation of each layer's neurons (most active first) and how many of them are hot.

Cost model, per decoded token and layer, with n hot neurons of F:
    accelerator = n * hot_neuron_s                          hot neurons are computed unasked
    host        = sum of frequency of the cold ones * cold_neuron_s
    layer       = max(accelerator, host + sync_s)   if 0 < n < F    (both at once, joined once)
                = accelerator if n == F; host if n == 0
Solved as a MILP (HiGHS): blocks of neurons are continuous, "any hot" and "all hot" are binary. So
a layer gets enough hot neurons to pay for the sync, or none.
Dimensions: L layers, F neurons, B blocks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from predictor.files import write_safetensors

from .errors import PlacementError

FORMAT_VERSION = "2"
# Where a layer's attention weights are: in accelerator memory; in host memory, copied over each
# time they are needed; or in host memory with the whole layer computed there.
Home = Literal["accelerator", "streamed", "host"]
HOMES: tuple[Home, ...] = ("accelerator", "streamed", "host")
NUM_BLOCKS = 32  # per layer: the plan's grain is F / 32 neurons
SOLVER_LIMITS = {"time_limit": 20.0, "mip_rel_gap": 1e-3}


@dataclass(frozen=True)
class MachineCosts:
    """Seconds. The defaults are those of a desktop GPU beside a dual-channel host, for 1 KiB rows;
    `is_measured` says whether the numbers are this machine's."""

    hot_neuron_s: float  # one neuron (gate, up and down row) on the accelerator
    cold_neuron_s: float  # one active neuron on the host
    sync_s: float  # handing one vector over and joining, per layer
    is_measured: bool = False

    @classmethod
    def estimate(
        cls,
        bytes_per_neuron: int,
        hot_bytes_per_s: float = 600e9,
        cold_bytes_per_s: float = 40e9,
        sync_s: float = 20e-6,
    ) -> "MachineCosts":
        """From memory bandwidths: decode reads every weight it uses once per token."""
        return cls(bytes_per_neuron / hot_bytes_per_s, bytes_per_neuron / cold_bytes_per_s, sync_s)


@dataclass(frozen=True, eq=False)
class Placement:
    """`order_LF[l, i]` is the checkpoint's index of layer l's i-th neuron; the first are hot."""

    order_LF: Tensor  # int64
    num_hot_L: tuple[int, ...]
    home_L: tuple[Home, ...] = ()  # none given: every layer attends on the accelerator

    def __post_init__(self) -> None:
        if not self.home_L:
            object.__setattr__(self, "home_L", ("accelerator",) * len(self.num_hot_L))
        if self.order_LF.ndim != 2 or len(self.num_hot_L) != len(self.order_LF):
            raise PlacementError(
                f"a placement needs one order and one count per layer, got order "
                f"{tuple(self.order_LF.shape)} and {len(self.num_hot_L)} counts"
            )
        L, F = self.order_LF.shape
        if not torch.equal(self.order_LF.sort(dim=1).values, torch.arange(F).expand(L, F)):
            raise PlacementError("a layer's order is not a permutation of its neurons")
        if any(not 0 <= n <= F for n in self.num_hot_L):
            raise PlacementError(f"hot counts must be from 0 to {F}, got {self.num_hot_L}")
        if len(self.home_L) != L or not set(self.home_L) <= set(HOMES):
            raise PlacementError(f"a placement needs one home of {HOMES} per layer")
        if any(n and home == "host" for n, home in zip(self.num_hot_L, self.home_L, strict=True)):
            raise PlacementError("a layer on the host has no hot neurons")

    @property
    def host_layers(self) -> tuple[int, ...]:
        return tuple(l for l, home in enumerate(self.home_L) if home == "host")

    @property
    def layers_kept_on_host(self) -> tuple[int, ...]:
        """Those whose attention weights are in host memory."""
        return tuple(l for l, home in enumerate(self.home_L) if home != "accelerator")

    def check_fits(self, num_layers: int, num_neurons: int) -> None:
        if tuple(self.order_LF.shape) != (num_layers, num_neurons):
            raise PlacementError(
                f"the placement is for {tuple(self.order_LF.shape)} (layers, neurons), the model "
                f"has {(num_layers, num_neurons)}; plan it again with `hotneuron place`"
            )

    def save(self, path: Path, fingerprint: str) -> None:
        tensors = {
            "order": self.order_LF.contiguous(),
            "num_hot": torch.tensor(self.num_hot_L),
            "home": torch.tensor([HOMES.index(home) for home in self.home_L]),
        }
        metadata = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Placement":
        fix = "plan it again with `hotneuron place`"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PlacementError(f"{path} is not a readable placement ({error}); {fix}") from error
        if metadata.get("format_version") != FORMAT_VERSION:
            raise PlacementError(f"{path} has another format version; {fix}")
        if metadata.get("fingerprint") != fingerprint:
            raise PlacementError(
                f"{path} was planned for the model {metadata.get('fingerprint')}, this one is "
                f"{fingerprint}; {fix}"
            )
        num_hot_L = tuple(int(n) for n in tensors["num_hot"])
        return cls(tensors["order"], num_hot_L, tuple(HOMES[i] for i in tensors["home"]))


def all_cold(num_layers: int, num_neurons: int) -> Placement:
    """The placement without an accelerator: nothing is hot, nothing moves."""
    return Placement(torch.arange(num_neurons).repeat(num_layers, 1), (0,) * num_layers)


def plan_placement(
    counts_LF: Tensor,
    num_tokens: int,
    bytes_per_neuron: int,
    budget_bytes: int,
    costs: MachineCosts,
) -> Placement:
    """The placement with the least modelled time per token within the budget.

    `counts_LF`: on how many of `num_tokens` tokens each neuron fired.
    """
    frequency_LF = counts_LF.double() / max(1, num_tokens)
    order_LF = torch.argsort(frequency_LF, dim=1, descending=True, stable=True)
    sorted_LF = torch.gather(frequency_LF, 1, order_LF).numpy()
    max_hot = max(0, budget_bytes) // bytes_per_neuron
    if max_hot == 0:
        return Placement(order_LF, (0,) * len(order_LF))
    num_hot_L = _solve(sorted_LF, max_hot, costs)
    keep_split_L = [
        n if layer_seconds(row, n, costs) < layer_seconds(row, 0, costs) else 0
        for row, n in zip(sorted_LF, num_hot_L, strict=True)
    ]
    return Placement(order_LF, tuple(keep_split_L))


def layer_seconds(sorted_F: np.ndarray, num_hot: int, costs: MachineCosts) -> float:
    """Modelled time of one layer's FFN for one token; `sorted_F` are frequencies, hot first."""
    accelerator = num_hot * costs.hot_neuron_s
    host = float(sorted_F[num_hot:].sum()) * costs.cold_neuron_s
    if num_hot == 0:
        return host
    if num_hot == len(sorted_F):
        return accelerator
    return max(accelerator, host + costs.sync_s)


def placement_seconds(frequency_LF: Tensor, placement: Placement, costs: MachineCosts) -> float:
    """Modelled FFN time of one token over all layers."""
    sorted_LF = torch.gather(frequency_LF.double(), 1, placement.order_LF).numpy()
    pairs = zip(sorted_LF, placement.num_hot_L, strict=True)
    return sum(layer_seconds(row, n, costs) for row, n in pairs)


def _solve(sorted_LF: np.ndarray, max_hot: int, costs: MachineCosts) -> list[int]:
    """Hot neurons per layer. Variables: x[l, b] share of block b that is hot, then per layer
    any_hot, all_hot (binary) and the layer's seconds."""
    L, F = sorted_LF.shape
    edges = np.linspace(0, F, min(NUM_BLOCKS, F) + 1).astype(int)
    size_B = np.diff(edges)
    B = len(size_B)
    # host seconds that block b costs while cold
    block_LB = np.add.reduceat(sorted_LF, edges[:-1], axis=1) * costs.cold_neuron_s
    unit = max(float(block_LB.sum()) / L, 1e-12)  # solve in units near 1
    num_x = L * B
    any_hot, all_hot, seconds = num_x, num_x + L, num_x + 2 * L
    num_variables = num_x + 3 * L
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(terms: dict[int, float], lower: float, upper: float) -> None:
        row = np.zeros(num_variables)
        for index, value in terms.items():
            row[index] = value
        rows.append(row)
        low.append(lower)
        high.append(upper)

    for l in range(L):
        x = range(l * B, (l + 1) * B)
        hot = {v: size_B[b] * costs.hot_neuron_s / unit for b, v in enumerate(x)}
        # seconds >= accelerator
        constrain({seconds + l: 1.0} | {v: -c for v, c in hot.items()}, 0, np.inf)
        # seconds >= host + sync * (any_hot - all_hot)
        cold = {v: block_LB[l, b] / unit for b, v in enumerate(x)}
        sync = costs.sync_s / unit
        terms = {seconds + l: 1.0, any_hot + l: -sync, all_hot + l: sync} | cold
        constrain(terms, float(block_LB[l].sum()) / unit, np.inf)
        # no block is hot unless any_hot; all are if all_hot
        constrain({any_hot + l: float(F)} | {v: -float(size_B[b]) for b, v in enumerate(x)}, 0, F)
        constrain({all_hot + l: -float(F)} | {v: float(size_B[b]) for b, v in enumerate(x)}, 0, F)
    budget = {l * B + b: float(size_B[b]) for l in range(L) for b in range(B)}
    constrain(budget, 0, float(max_hot))
    objective = np.zeros(num_variables)
    objective[seconds:] = 1.0
    integrality = np.zeros(num_variables)
    integrality[any_hot:seconds] = 1
    upper_bound = np.ones(num_variables)
    upper_bound[seconds:] = np.inf
    result = milp(
        objective,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=integrality,
        bounds=Bounds(0, upper_bound),
        options=SOLVER_LIMITS,
    )
    if result.x is None:
        raise PlacementError(f"the placement solver found no plan: {result.message}")
    share_LB = result.x[:num_x].reshape(L, B)
    return [int(np.floor(share_B @ size_B + 1e-6)) for share_B in share_LB]
