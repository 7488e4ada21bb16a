"""What is run and how: `ModelConfig` from a checkpoint's config.json, `EngineConfig` from the user.

Hugging Face names appear here and in loader.py, nowhere else in the runtime. Activation, threshold,
gating and biases are data of the config, not separate code paths.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from predictor.thresholds import read_thresholds

from .errors import InvalidConfig, UnsupportedModel

Activation = Literal["relu", "silu"]  # FATReLU is relu with a threshold
Mode = Literal["dense", "exact", "predicted"]
MODES: tuple[Mode, ...] = ("dense", "exact", "predicted")
SUPPORTED_TYPES = ("llama", "sparsellama")
SUPPORTED_ROPES = ("default", "linear", "llama3")
DEFAULT_MAX_CONTEXT = 8192
PROMPT_PART = 256  # tokens: prompts that begin alike share whole parts; longer ones read faster


def mode_runs(mode_N: Sequence[Mode]) -> list[tuple[slice, Mode]]:
    """Tokens of one mode that stand together."""
    runs, start = [], 0
    for mode, group in groupby(mode_N):
        stop = start + len(list(group))
        runs.append((slice(start, stop), mode))
        start = stop
    return runs


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `kind` is one of SUPPORTED_ROPES, `params` its extra numbers."""

    theta: float = 10000.0
    kind: str = "default"
    params: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a Llama-family checkpoint."""

    num_layers: int
    d_model: int
    num_neurons: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    activation: Activation
    thresholds: tuple[float, ...]  # FATReLU, by layer: a gate fires above it; 0 is plain ReLU
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether neurons can be exactly zero, so that the modes exact and predicted exist."""
        return self.activation == "relu"

    @property
    def activation_name(self) -> str:
        low, high = min(self.thresholds), max(self.thresholds)
        if self.activation == "silu" or high == 0:
            return self.activation
        return f"fatrelu({low:g})" if low == high else f"fatrelu({low:g} to {high:g} by layer)"

    @classmethod
    def from_folder(cls, folder: Path | str) -> "ModelConfig":
        folder = Path(folder)
        raw = _read_json(folder / "config.json")
        if raw is None:
            raise UnsupportedModel(
                f"{folder} has no config.json; give a Hugging Face model folder, "
                "or `default` for the built-in model"
            )
        generation = _read_json(folder / "generation_config.json") or {}
        return cls.from_hf(raw, generation)

    @classmethod
    def from_hf(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Translate config.json (and generation_config.json); refuse by name what is not run."""
        model_type = raw.get("model_type", "llama")
        if model_type not in SUPPORTED_TYPES:
            raise UnsupportedModel(
                f"model_type {model_type!r} is not supported; supported: "
                f"{', '.join(SUPPORTED_TYPES)}"
            )
        for name in ("attention_bias", "mlp_bias"):
            if raw.get(name):
                raise UnsupportedModel(f"config.json has {name} true; biases are not supported")
        if raw.get("quantization_config"):
            raise UnsupportedModel(
                "config.json has quantization_config; give the bf16, fp16 or fp32 checkpoint"
            )
        try:
            num_heads = int(raw["num_attention_heads"])
            d_model = int(raw["hidden_size"])
            num_layers = int(raw["num_hidden_layers"])
            activation, thresholds = _activation(raw, num_layers)
            config = cls(
                num_layers=num_layers,
                d_model=d_model,
                num_neurons=int(raw["intermediate_size"]),
                num_heads=num_heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
                head_dim=int(raw.get("head_dim") or d_model // num_heads),
                vocab_size=int(raw["vocab_size"]),
                max_positions=int(raw.get("max_position_embeddings", 2048)),
                rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope=_rope(raw),
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
                activation=activation,
                thresholds=thresholds,
                eos_token_ids=_token_ids((generation or {}).get("eos_token_id"))
                or _token_ids(raw.get("eos_token_id")),
                bos_token_id=raw.get("bos_token_id"),
            )
        except KeyError as error:
            raise UnsupportedModel(f"config.json lacks {error.args[0]!r}") from error
        if config.num_heads % config.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads {config.num_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even, got {config.head_dim}")
        return config


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} holds {type(value).__name__}, not an object")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _activation(raw: dict[str, Any], num_layers: int) -> tuple[Activation, tuple[float, ...]]:
    name = str(raw.get("hidden_act", "silu"))
    if name in ("relu", "fatrelu"):
        try:
            return "relu", read_thresholds(raw, num_layers)
        except ValueError as error:
            raise UnsupportedModel(f"config.json: {error}") from error
    if name in ("silu", "swish"):
        return "silu", (0.0,) * num_layers
    raise UnsupportedModel(
        f"hidden_act {name!r} is not supported; supported: relu, fatrelu (sparse), silu (dense)"
    )


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Newer checkpoints nest theta in rope_parameters; older ones have rope_theta on top."""
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(nested.get("rope_type") or nested.get("type") or "default")
    if kind not in SUPPORTED_ROPES:
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPES)}"
        )
    if float(nested.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not supported")
    theta = nested.get("rope_theta", raw.get("rope_theta", 10000.0))
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        ),
    }[kind]  # fmt: skip
    missing = [name for name in needed if name not in nested]
    if missing:
        raise UnsupportedModel(f"rope type {kind!r} lacks {', '.join(missing)} in config.json")
    return RopeConfig(float(theta), kind, {name: float(nested[name]) for name in needed})


WEIGHT_BITS: dict[str, Literal[8, 4] | None] = {"bf16": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class EngineConfig:
    """What the user may set. `resolved()` replaces 'auto' and None; `mode` needs the files."""

    model_dir: Path
    mode: Literal["auto", "dense", "exact", "predicted"] = "auto"
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["auto", "bf16", "int8", "int4"] = "auto"  # auto: as dtype says
    threads: int | None = None
    vram_budget_bytes: int | None = None
    max_batch: int = 16
    max_queue: int = 64
    max_context: int | None = None
    kv_tokens: int | None = None
    audit_rate: float = 0.05  # share of decode steps whose tokens are audited
    recall_floor: float | None = None  # audited recall at which the drift guard steps in
    kernels: Literal["auto", "cpu", "torch"] = "auto"
    model_name: str | None = None
    on_gpu_loss: Literal["exit", "cpu"] = "exit"  # end, or load the model on the CPU and go on
    placement: Path | None = None  # a saved plan; None: plan at start

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *MODES):
            raise InvalidConfig(f"mode must be auto, dense, exact or predicted, got {self.mode!r}")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise InvalidConfig(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise InvalidConfig(f"dtype must be auto, bfloat16 or float32, got {self.dtype!r}")
        if self.weights not in ("auto", *WEIGHT_BITS):
            raise InvalidConfig(f"weights must be auto, bf16, int8 or int4, got {self.weights!r}")
        if self.weights == "bf16" and self.dtype == "float32":
            raise InvalidConfig("weights bf16 and dtype float32 exclude each other; leave one out")
        if self.kernels not in ("auto", "cpu", "torch"):
            raise InvalidConfig(f"kernels must be auto, cpu or torch, got {self.kernels!r}")
        if self.on_gpu_loss not in ("exit", "cpu"):
            raise InvalidConfig(f"on_gpu_loss must be exit or cpu, got {self.on_gpu_loss!r}")
        for name in ("threads", "max_batch", "max_queue", "max_context", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name} must be at least 1, got {value}")
        if self.vram_budget_bytes is not None and self.vram_budget_bytes < 0:
            raise InvalidConfig(f"vram_budget_bytes must be at least 0: {self.vram_budget_bytes}")
        if not 0.0 <= self.audit_rate <= 1.0:
            raise InvalidConfig(f"audit_rate must be from 0 to 1, got {self.audit_rate}")
        if self.recall_floor is not None:
            if not 0.0 < self.recall_floor < 1.0:
                raise InvalidConfig(
                    f"recall_floor must lie between 0 and 1, got {self.recall_floor}"
                )
            if not self.audit_rate:
                raise InvalidConfig(
                    "recall_floor needs the audit, which measures recall; set audit_rate above 0, "
                    "or leave recall_floor out"
                )

    def resolved(self) -> "EngineConfig":
        """The same settings with everything that does not depend on the model decided."""
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device.startswith("cuda") and not torch.cuda.is_available():
            raise InvalidConfig(
                f"device {device} was asked for, but torch sees no CUDA device; use --device cpu "
                "or install a CUDA build of torch"
            )
        return replace(
            self,
            model_dir=Path(self.model_dir),
            device=device,
            dtype="bfloat16" if self.dtype == "auto" else self.dtype,
            threads=self.threads or usable_cpus(),
            kernels="cpu" if self.kernels == "auto" else self.kernels,
            model_name=self.model_name or Path(self.model_dir).resolve().name,
        )


def usable_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut by a cgroup quota if there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = _cgroup_cpus(Path("/sys/fs/cgroup"))
    return max(1, min(count, math.ceil(quota)) if quota else count)


def _cgroup_cpus(root: Path) -> float | None:
    try:
        words = (root / "cpu.max").read_text().split()
        if words[0] != "max":
            return int(words[0]) / int(words[1])
    except OSError:
        pass
    try:
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period = int((root / "cpu/cpu.cfs_period_us").read_text())
    except OSError:
        return None
    return quota / period if quota > 0 else None
