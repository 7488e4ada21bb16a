"""What a model takes of the accelerator's memory, by name, and the plan that stays within a budget.

All is counted before anything is loaded: what is there in any case (`fixed_bytes`), and what a plan
adds. The driver's own context, some hundred MiB of any process that uses the device, comes on top.
Dimensions: N tokens of a prompt's part, D model width, F neurons, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from predictor import ActivationProfile, PredictorSet

from .config import PROMPT_PART, Mode, ModelConfig
from .errors import InvalidConfig
from .planner import Plan, Planner
from .workload import MachineCosts, Workload

MIB = 1 << 20
LIBRARY_BYTES = 96 * MIB  # scratch memory of matrix products on two streams, and of the kernels
PROMPT_TENSORS = 6  # of [N, F] and of [N, D] in fp32 that are alive at once while a prompt is read
ROUNDING = 1.01  # blocks of the allocator are a little larger than what is asked for


@dataclass(frozen=True)
class Needs:
    """Sizes of a model that is to be served in a certain way."""

    config: ModelConfig
    dtype: torch.dtype
    kv_tokens: int
    max_context: int
    max_batch: int
    mode: Mode
    predictors: PredictorSet | None

    def fixed_bytes(self) -> dict[str, int]:
        """What the accelerator holds whatever is hot."""
        c, size = self.config, self.dtype.itemsize
        D, F, V = c.d_model, c.num_neurons, c.vocab_size
        prompt = 4 * PROMPT_TENSORS * PROMPT_PART * (F + D) + self.attention_bytes
        return {
            "head": V * D * size,
            "norms and tables": 4 * ((2 * c.num_layers + 1) * D + self.max_context * c.head_dim),
            "exchange": self.max_batch * (8 * D + F),
            "workspace": LIBRARY_BYTES + prompt + 3 * 4 * self.max_batch * V,
        }

    @property
    def attention_bytes(self) -> int:
        """Of one layer."""
        c = self.config
        return 2 * (c.num_heads + c.num_kv_heads) * c.head_dim * c.d_model * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.config.d_model * self.dtype.itemsize

    def workload(
        self, profile: ActivationProfile | None, *, hot_is_sparse: bool = False
    ) -> Workload:
        """For the planner. Without a profile all neurons count as firing equally often."""
        c = self.config
        if profile is None:
            ones_LF = torch.ones(c.num_layers, c.num_neurons, dtype=torch.int64)
            profile = ActivationProfile(ones_LF, 1)
        if tuple(profile.counts_LF.shape) != (c.num_layers, c.num_neurons):
            raise InvalidConfig(
                f"the activation profile is for {tuple(profile.counts_LF.shape)} (layers, "
                f"neurons), the model has {(c.num_layers, c.num_neurons)}; record it again with "
                "`train-predictors`"
            )
        predictor_bytes = 0
        if self.predictors is not None and self.mode == "predicted":
            predictor_bytes = -(-self.predictors.num_bytes // c.num_layers)
        return Workload(
            profile.frequency_LF,
            row_bytes=self.row_bytes,
            attention_bytes=self.attention_bytes,
            kv_bytes=self.kv_tokens * 2 * c.num_kv_heads * c.head_dim * self.dtype.itemsize,
            predictor_bytes=predictor_bytes,
            head_bytes=c.vocab_size * c.d_model * self.dtype.itemsize,
            mode=self.mode,
            hot_is_sparse=hot_is_sparse,
        )


@dataclass(frozen=True)
class Ledger:
    """Bytes of accelerator memory by what they hold."""

    entries: Mapping[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.entries.values())

    @property
    def unused(self) -> int:
        return self.budget - self.total


def planner_within(needs: Needs, workload: Workload, costs: MachineCosts, budget: int) -> Planner:
    """The planner of what the budget leaves. InvalidConfig: it does not even hold what is fixed."""
    fixed = needs.fixed_bytes()
    left = int(budget / ROUNDING) - sum(fixed.values())
    if left < 0:
        least = int(sum(fixed.values()) * ROUNDING) + 1
        parts = ", ".join(f"{name} {count / MIB:.0f} MiB" for name, count in fixed.items())
        raise InvalidConfig(
            f"a VRAM budget of {budget} bytes does not hold what the accelerator needs in any case "
            f"({parts}): give --vram-budget {-(-least // MIB)}MiB or more, lower --max-batch or "
            "--max-context, or use --device cpu"
        )
    return Planner(workload, costs, left)


def ledger_of(needs: Needs, workload: Workload, plan: Plan, budget: int) -> Ledger:
    """What the plan takes, by name."""
    homes = plan.placement.home_L
    attended = len(homes) - homes.count("host")
    slot = "streamed" in homes
    return Ledger(
        {
            **needs.fixed_bytes(),
            "attention": homes.count("accelerator") * workload.attention_bytes,
            "slot of streamed attention": slot * workload.attention_bytes,
            "keys and values": attended * workload.kv_bytes,
            "predictors": attended * workload.predictor_bytes,
            "hot neurons": sum(plan.placement.num_hot_L) * workload.neuron_bytes,
        },
        budget,
    )


@contextmanager
def within_budget(device: str, ledger: Ledger | None) -> Iterator[None]:
    """While a model is loaded, and from then on: the allocator takes no more than the budget.
    InvalidConfig: it would have to."""
    if ledger is None:
        yield
        return
    total = torch.cuda.mem_get_info(torch.device(device))[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, ledger.budget / total), device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InvalidConfig(
            f"the accelerator's memory ran out while the model was loaded, though "
            f"{ledger.total / MIB:.0f} MiB of {ledger.budget / MIB:.0f} MiB were planned: give a "
            f"smaller --vram-budget if others use the device, or --device cpu ({error})"
        ) from error


def driver_bytes(device: torch.device) -> dict[str, int]:
    """What the driver and the allocator say is taken now."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "taken_of_device": total - free,
    }
