"""From an `EngineConfig` to the parts of an engine: every 'auto' is decided here, once, and logged.

Owns no state. The order matters: model facts, predictors, mode, context and cache sizes, placement,
weights.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from predictor import (
    ActivationProfile,
    PredictorSet,
    fingerprint,
    load_predictors,
)
from predictor.checkpoint import MANIFEST_FILE, PredictorCorrupted, PredictorMismatch
from predictor.kinds import GateCopy
from predictor.profile import PROFILE_FILE

from .accelerator import new_accelerator
from .budget import Ledger, Needs, ledger_of, planner_within, within_budget
from .checks import NOT_SPARSE, Kernels
from .config import DEFAULT_MAX_CONTEXT, WEIGHT_BITS, EngineConfig, Mode, ModelConfig
from .errors import InvalidConfig, UnsupportedModel
from .kernels import KernelUnavailable, cpu_backend
from .kv_cache import bytes_per_token
from .measure import machine_rates
from .model import Model
from .placement import Placement

log = logging.getLogger(__name__)
SPARSITY_FOLDER = "sparsity"
FREE_MEMORY_SHARE = 0.25  # of free host memory that keys and values may take by default
# Of free accelerator memory that is left to others by default, at least.
VRAM_RESERVE_SHARE, VRAM_RESERVE_BYTES = 0.05, 512 << 20


@dataclass(frozen=True)
class EngineParts:
    """What `Engine` is made of. `config` is resolved: nothing in it is 'auto' or None any more,
    except `seed`-like choices of single requests and `vram_budget_bytes` without accelerator."""

    config: EngineConfig
    mode: Mode
    model: Model
    fingerprint: str
    kv_tokens: int
    predictors: PredictorSet | None
    predictors_note: str | None  # why predictors are not in use, if they are not
    ledger: Ledger | None = None  # what the accelerator's memory is for; None without one


def build(config: EngineConfig) -> EngineParts:
    config = config.resolved()
    needs, note = _needs(config)
    mode = needs.mode
    if config.recall_floor is not None and mode != "predicted":
        raise InvalidConfig(
            f"recall_floor guards predictors, and mode {mode} uses none; leave it out, or serve "
            "with `--sparsity predicted`"
        )
    model_fingerprint = fingerprint(config.model_dir)
    placement, ledger = _placement(config, needs, model_fingerprint)
    with within_budget(config.device, ledger):
        model = load_model(config, needs, placement)
    config = replace(config, mode=mode, max_context=needs.max_context, kv_tokens=needs.kv_tokens)
    log.info("engine: %s", config)
    return EngineParts(
        config, mode, model, model_fingerprint, needs.kv_tokens, needs.predictors, note, ledger
    )


def needs_of(config: EngineConfig) -> Needs:
    """What a resolved config asks of the accelerator."""
    return _needs(config)[0]


def _needs(config: EngineConfig) -> tuple[Needs, str | None]:
    """With the reason why predictors are not in use, if they are not."""
    model_config = ModelConfig.from_folder(config.model_dir)
    _set_threads(config, _kernels(config))
    predictors, note = _predictors(config, model_config, fingerprint(config.model_dir))
    mode = resolve_mode(
        config.mode,
        model_config,
        predictors is not None,
        predictors is None or predictors_pay(predictors, config.weights),
    )
    dtype: torch.dtype = getattr(torch, config.dtype)
    max_context, kv_tokens = _context(config, model_config, dtype)
    needs = Needs(model_config, dtype, kv_tokens, max_context, config.max_batch, mode, predictors)
    return needs, note


def load_model(config: EngineConfig, needs: Needs, placement: Placement | None) -> Model:
    return Model.from_folder(
        config.model_dir,
        device=config.device,
        dtype=needs.dtype,
        kernels=_kernels(config),
        predictors=needs.predictors,
        placement=placement,
        max_context=needs.max_context,
        weight_bits=WEIGHT_BITS.get(config.weights),
        max_batch=config.max_batch,
    )


def predictors_pay(predictors: PredictorSet, weights: str) -> bool:
    """Whether they may spare reading: a copy of the gates in as many bits as the gates does not."""
    bits = WEIGHT_BITS.get(weights)
    copies = [layer for layer in predictors if isinstance(layer, GateCopy)]
    return bits is None or not any(copy.bits >= bits for copy in copies)


def resolve_mode(
    asked: str, config: ModelConfig, has_predictors: bool, predictors_pay: bool = True
) -> Mode:
    """'auto' is the fastest mode that the files allow; anything else is taken at its word."""
    if asked == "auto":
        if not config.is_sparse:
            return "dense"
        return "predicted" if has_predictors and predictors_pay else "exact"
    if asked != "dense" and not config.is_sparse:
        raise UnsupportedModel(NOT_SPARSE.format(name=config.activation))
    if asked == "predicted" and not has_predictors:
        raise InvalidConfig(
            "mode predicted needs predictors, and the model folder has none: make them with "
            "`train-predictors`, or serve with `--sparsity exact`"
        )
    return _as_mode(asked)


def _as_mode(name: str) -> Mode:
    modes: dict[str, Mode] = {"dense": "dense", "exact": "exact", "predicted": "predicted"}
    return modes[name]


def _kernels(config: EngineConfig) -> Kernels:
    if config.kernels == "torch":
        return "torch"
    try:
        cpu = cpu_backend()
    except KernelUnavailable as error:
        raise InvalidConfig(str(error)) from error
    log.info("kernels: C++, %s", cpu.isa())
    return "cpu"


def _set_threads(config: EngineConfig, kernels: Kernels) -> None:
    """One number for both pools; they do not run at the same time but in a hybrid layer."""
    assert config.threads is not None, "the config is resolved"
    torch.set_num_threads(config.threads)
    if kernels == "cpu":
        from .kernels import cpu

        cpu.set_num_threads(config.threads)


def _predictors(
    config: EngineConfig, model_config: ModelConfig, model_fingerprint: str
) -> tuple[PredictorSet | None, str | None]:
    """Predictors of this model. Damaged or foreign ones stop the start, unless the user chose a
    mode that computes without them: then they are left out, and the reports say why."""
    folder = config.model_dir / SPARSITY_FOLDER
    if not model_config.is_sparse:
        return None, f"activation {model_config.activation} is dense"
    if not (folder / MANIFEST_FILE).is_file():
        return None, "the model folder has none; make them with `train-predictors`"
    try:
        return load_predictors(folder, fingerprint=model_fingerprint), None
    except (PredictorCorrupted, PredictorMismatch) as error:
        if config.mode not in ("dense", "exact"):
            raise
        log.warning("serving %s without predictors, recall is not measured: %s", config.mode, error)
        return None, str(error)


def _context(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype
) -> tuple[int, int]:
    """(longest context, budget of cached positions)."""
    max_positions = model_config.max_positions
    if config.max_context is not None and config.max_context > max_positions:
        raise InvalidConfig(
            f"max_context {config.max_context} is above the model's {max_positions} positions"
        )
    max_context = config.max_context or min(max_positions, DEFAULT_MAX_CONTEXT)
    if config.kv_tokens is not None:
        if config.max_context is not None and config.kv_tokens < max_context:
            raise InvalidConfig(
                f"kv_tokens {config.kv_tokens} cannot hold one sequence of max_context "
                f"{max_context}; raise --kv-tokens or lower --max-context"
            )
        return min(max_context, config.kv_tokens), config.kv_tokens
    memory = _free_memory(config.device)
    if config.device != "cpu" and config.vram_budget_bytes is not None:
        memory = min(memory, config.vram_budget_bytes)
    room = FREE_MEMORY_SHARE * memory // bytes_per_token(model_config, dtype)
    if room < max_context and config.max_context is not None:
        raise InvalidConfig(
            f"a context of {max_context} tokens does not fit a quarter of the free memory; "
            "lower --max-context or set --kv-tokens"
        )
    max_context = max(1, min(max_context, int(room)))
    return max_context, min(config.max_batch * max_context, max(max_context, int(room)))


def _free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InvalidConfig("cannot read the free memory of this machine; set --kv-tokens")


def _placement(
    config: EngineConfig, needs: Needs, model_fingerprint: str
) -> tuple[Placement | None, Ledger | None]:
    """None without an accelerator: every neuron is cold, in the checkpoint's order."""
    if not config.device.startswith("cuda"):
        asked: list[Literal["placement", "vram_budget_bytes"]] = []
        if config.placement is not None:
            asked.append("placement")
        if config.vram_budget_bytes:
            asked.append("vram_budget_bytes")
        if asked:
            raise InvalidConfig(
                f"{' and '.join(asked)} given, but there is no accelerator: with device cpu every "
                "neuron is cold; leave it out, or run where torch sees a CUDA device"
            )
        return None, None
    budget = config.vram_budget_bytes
    if budget is None:
        free = _free_memory(config.device)
        budget = free - max(int(VRAM_RESERVE_SHARE * free), VRAM_RESERVE_BYTES)
    accelerator = new_accelerator(torch.device(config.device))
    profile = read_profile(config.model_dir)
    workload = needs.workload(profile)
    rates = machine_rates(accelerator, needs.config.d_model)
    planner = planner_within(needs, workload, rates.costs(workload.active_share), budget)
    if config.placement is None:
        plan = planner.best()
    else:
        placement = Placement.load(config.placement, model_fingerprint)
        placement.check_fits(needs.config.num_layers, needs.config.num_neurons)
        plan = planner.plan_for(placement)
        if plan.bytes > planner.budget:
            raise InvalidConfig(
                f"{config.placement} takes {plan.bytes} bytes of the accelerator beside what is "
                f"needed in any case, and the VRAM budget leaves {planner.budget}; raise "
                "--vram-budget, or plan it again with `hotneuron place`"
            )
    ledger = ledger_of(needs, workload, plan, budget)
    log.info("placement: modelled %.1f tokens/s, %s", 1 / plan.seconds, ledger)
    return plan.placement, ledger


def read_profile(folder: Path) -> ActivationProfile | None:
    """The model folder's counts of activations, if there are any."""
    path = folder / SPARSITY_FOLDER / PROFILE_FILE
    if path.is_file():
        return ActivationProfile.load(path)
    log.warning("no activation profile: neurons are placed as if all fired equally often")
    return None
