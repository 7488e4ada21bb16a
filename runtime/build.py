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

from .checks import NOT_SPARSE, Kernels
from .config import DEFAULT_MAX_CONTEXT, WEIGHT_BITS, EngineConfig, Mode, ModelConfig
from .errors import InvalidConfig, UnsupportedModel
from .kernels import KernelUnavailable, cpu_backend
from .kv_cache import bytes_per_token
from .model import Model
from .placement import MachineCosts, Placement, plan_placement

log = logging.getLogger(__name__)
SPARSITY_FOLDER = "sparsity"
FREE_MEMORY_SHARE = 0.25  # of free host memory that keys and values may take by default
VRAM_SHARE = 0.9  # of free accelerator memory that is used by default


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


def build(config: EngineConfig) -> EngineParts:
    config = config.resolved()
    model_config = ModelConfig.from_folder(config.model_dir)
    kernels = _kernels(config)
    _set_threads(config, kernels)
    model_fingerprint = fingerprint(config.model_dir)
    predictors, note = _predictors(config, model_config, model_fingerprint)
    mode = resolve_mode(
        config.mode,
        model_config,
        predictors is not None,
        predictors is None or predictors_pay(predictors, config.weights),
    )
    if config.recall_floor is not None and mode != "predicted":
        raise InvalidConfig(
            f"recall_floor guards predictors, and mode {mode} uses none; leave it out, or serve "
            "with `--sparsity predicted`"
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    max_context, kv_tokens = _context(config, model_config, dtype)
    placement = _placement(config, model_config, dtype, kv_tokens, predictors, model_fingerprint)
    model = Model.from_folder(
        config.model_dir,
        device=config.device,
        dtype=dtype,
        kernels=kernels,
        predictors=predictors,
        placement=placement,
        max_context=max_context,
        weight_bits=WEIGHT_BITS.get(config.weights),
    )
    config = replace(config, mode=mode, max_context=max_context, kv_tokens=kv_tokens)
    log.info("engine: %s", config)
    return EngineParts(config, mode, model, model_fingerprint, kv_tokens, predictors, note)


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


def fixed_bytes(
    config: ModelConfig, dtype: torch.dtype, kv_tokens: int, predictors: PredictorSet | None
) -> int:
    """What the accelerator holds before any neuron: attention, embeddings, KV, predictors."""
    D, attention_rows = config.d_model, (config.num_heads + config.num_kv_heads) * config.head_dim
    embeddings = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    weights = embeddings + config.num_layers * 2 * attention_rows * D
    kv = kv_tokens * bytes_per_token(config, dtype)
    return weights * dtype.itemsize + kv + (predictors.num_bytes if predictors else 0)


def neuron_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """One neuron is three rows: gate, up, down."""
    return 3 * config.d_model * dtype.itemsize


def _placement(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    kv_tokens: int,
    predictors: PredictorSet | None,
    model_fingerprint: str,
) -> Placement | None:
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
        return None
    if config.placement is not None:
        return Placement.load(config.placement, model_fingerprint)
    budget = config.vram_budget_bytes
    if budget is None:
        budget = int(VRAM_SHARE * _free_memory(config.device))
    fixed = fixed_bytes(model_config, dtype, kv_tokens, predictors)
    if budget < fixed:
        raise InvalidConfig(
            f"a VRAM budget of {budget} bytes does not hold attention, embeddings, "
            f"{kv_tokens} cached tokens and predictors ({fixed} bytes); raise --vram-budget, "
            "lower --kv-tokens, or use --device cpu"
        )
    profile_path = config.model_dir / SPARSITY_FOLDER / PROFILE_FILE
    shape = (model_config.num_layers, model_config.num_neurons)
    if profile_path.is_file():
        profile = ActivationProfile.load(profile_path)
    else:
        log.warning("no activation profile: neurons are placed as if all fired equally often")
        profile = ActivationProfile(torch.ones(shape, dtype=torch.int64), 1)
    size = neuron_bytes(model_config, dtype)
    costs = MachineCosts.estimate(size)
    placement = plan_placement(profile.counts_LF, profile.num_tokens, size, budget - fixed, costs)
    placement.check_fits(*shape)
    return placement
