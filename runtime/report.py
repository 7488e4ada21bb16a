"""The engine's report: one dict for dashboard, metrics and command line.

What was not measured is None; nothing here is estimated. Reads, never changes.
"""

import json
import logging
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from predictor import PredictorSet
from predictor.thresholds import config_value

from .budget import driver_bytes
from .build import SPARSITY_FOLDER
from .config import Mode
from .kv_cache import BLOCK, bytes_per_token

if TYPE_CHECKING:
    from .engine import Engine
    from .model import Model


log = logging.getLogger(__name__)
TRAINING_KEYS = ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "tokens")


def engine_report(engine: "Engine") -> dict[str, Any]:
    audit = engine.audit.report()
    hot = engine.model.num_hot_L
    times = engine.ffn_meter.layer_times()
    return {
        "model": _model(engine),
        "mode": engine.mode,
        "modes": _modes(engine.model),
        "predictors": engine.parts.predictors_note or "loaded",
        **_predictor_size(engine.parts.predictors),
        "devices": _devices(engine),
        "threads": engine.config.threads,
        "kernels": _kernels(engine),
        "uptime_s": engine.stats.uptime_s,
        "max_context": engine.max_context,
        "kv_tokens": engine.kv_cache.num_tokens,
        "kv_blocks": {
            "used": engine.kv_cache.blocks.num_used,
            "kept": engine.kv_cache.blocks.num_kept,
            "total": engine.kv_cache.blocks.num_blocks,
        },
        "placement": _placement(engine, hot),
        "layers": [
            {**row, "hot_neurons": n, "ffn_times": times[layer], **_guard(engine, layer)}
            for layer, (row, n) in enumerate(zip(audit["layers"], hot, strict=True))
        ],
        "mean": {**audit["mean"], "hot_neurons": sum(hot) / len(hot)},
        "training": _training(engine),
        "audit_rate": engine.config.audit_rate,
        "recall_floor": engine.config.recall_floor,
        "speed": _speed(engine),
        "time_split": _time_split(engine),
        "ffn_split": _ffn_split(engine),
        "hybrid_split": engine.hybrid_meter.report(),
        "steps": {"decode": engine.stats.decode_steps, "prompt": engine.stats.prompt_steps},
        "served_speeds": engine.stats.served_speeds(),
        "density": engine.ffn_meter.densities(),
        "activation": engine.audit.activation(),
        "memory": _memory(engine, hot),
        "queue": {
            "running": engine.scheduler.num_admitted,
            "waiting": max(0, engine.num_in_flight - engine.scheduler.num_admitted),
            "max_batch": engine.config.max_batch,
            "max_queue": engine.config.max_queue,
        },
        "totals": asdict(engine.stats.totals),
        "config": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(engine.config).items()
        },
    }


def _model(engine: "Engine") -> dict[str, Any]:
    config = engine.model_config
    return {
        "name": engine.model_name,
        "folder": str(engine.config.model_dir),
        "fingerprint": engine.parts.fingerprint,
        "num_layers": config.num_layers,
        "num_neurons": config.num_neurons,
        "d_model": config.d_model,
        "activation": config.activation_name,
        "threshold": config_value(config.thresholds),
        "dtype": engine.config.dtype,
        "weights": engine.config.dtype
        if engine.config.weights == "auto"
        else engine.config.weights,
    }


def _modes(model: "Model") -> list[Mode]:
    """Those that `Model.check_mode` lets pass."""
    sparse: list[Mode] = ["exact", "predicted"] if model.has_predictors else ["exact"]
    return ["dense", *(sparse if model.config.is_sparse else [])]


def _guard(engine: "Engine", layer: int) -> dict[str, Any]:
    """The layer's state and its recall on the last audited tokens; None without a guard."""
    guard = engine.guard
    return {
        "guard": guard and guard.states[layer],
        "recent_recall": guard and guard.recent_recall[layer],
    }


def _predictor_size(predictors: PredictorSet | None) -> dict[str, Any]:
    """Which kind they are, and what a token reads of them in all layers."""
    if predictors is None:
        return {"predictor_kind": None, "predictor_bytes": None}
    return {"predictor_kind": predictors[0].kind, "predictor_bytes": predictors.num_bytes}


def _training(engine: "Engine") -> dict[str, Any] | None:
    """What the predictors were worth on held-out texts when they were made, if that was kept."""
    if engine.parts.predictors is None:
        return None
    return _read_training(engine.config.model_dir / SPARSITY_FOLDER / "report.json")


@cache
def _read_training(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        mean = json.loads(path.read_text(encoding="utf-8"))["mean"]
        return {key: mean[key] for key in TRAINING_KEYS}
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s tells nothing about the predictors: %r", path, error)
        return None


def _devices(engine: "Engine") -> dict[str, str | None]:
    device = engine.model.device
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"accelerator": accelerator, "host": host_name()}


@cache
def host_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _kernels(engine: "Engine") -> str:
    if engine.model.kernels == "torch":
        return "torch"
    from .kernels import cpu

    return f"cpu ({cpu.isa()})"


def _placement(engine: "Engine", hot: list[int]) -> dict[str, Any]:
    hot_bytes, cold_bytes = _neuron_bytes(engine, hot)
    return {
        "vram_budget_bytes": engine.config.vram_budget_bytes,
        "hot_neurons": hot,
        "hot_bytes": hot_bytes,
        "cold_bytes": cold_bytes,
        "vram": _vram(engine),
    }


def _neuron_bytes(engine: "Engine", hot: list[int]) -> tuple[int, int]:
    """Of the hot and of the cold neurons' rows, in the format that they are kept in."""
    all_bytes = engine.model.weight_bytes["ffn"]
    num_neurons = engine.model_config.num_neurons * len(hot)
    hot_bytes = round(all_bytes * sum(hot) / num_neurons)
    return hot_bytes, all_bytes - hot_bytes


def _vram(engine: "Engine") -> dict[str, Any] | None:
    """What the accelerator's memory was planned for, and what the driver says; None without one."""
    ledger = engine.parts.ledger
    if ledger is None:
        return None
    measured = driver_bytes(engine.model.device)
    return {"planned": dict(ledger.entries), "planned_total": ledger.total, "measured": measured}


def _memory(engine: "Engine", hot: list[int]) -> dict[str, int]:
    """Bytes by what they hold; norms are too small to count. Of keys and values: the budget, and
    what of it is taken."""
    weights = engine.model.weight_bytes
    hot_bytes, cold_bytes = _neuron_bytes(engine, hot)
    per_token = bytes_per_token(engine.model_config, engine.model.dtype)
    blocks = engine.kv_cache.blocks
    return {
        "embeddings": weights["embeddings"],
        "attention": weights["attention"],
        "ffn_hot": hot_bytes,
        "ffn_cold": cold_bytes,
        "predictors": engine.parts.predictors.num_bytes if engine.parts.predictors else 0,
        "kv_budget": blocks.num_blocks * BLOCK * per_token,
        "kv_taken": blocks.num_used * BLOCK * per_token,
    }


def _speed(engine: "Engine") -> dict[str, Any]:
    last, measured = engine.stats.comparison, engine.stats.measured
    result = measured.report() if measured else {}
    speeds = result.get("speeds", {})
    now, dense = speeds.get(engine.mode, {}), speeds.get("dense", {})
    how = None
    if result:
        rounds = f"{result['rounds']} rounds of {result['round_tokens']} tokens in each mode"
        how = f"measured, batch {result['batch']}, {rounds} by turns"
    return {
        "mode": engine.mode,
        "decode_tokens_per_s": now.get("tokens_per_s"),
        "decode_ci95": now.get("tokens_per_s_ci95"),
        "decode_tokens": now.get("tokens"),
        "dense_tokens_per_s": dense.get("tokens_per_s"),
        "dense_ci95": dense.get("tokens_per_s_ci95"),
        "dense_tokens": dense.get("tokens"),
        "speedup": result.get("speedup"),
        "speedup_ci95": result.get("speedup_ci95"),
        "how": how,
        "batch": result.get("batch"),
        "measured_at": result.get("started_at"),
        "benchmark": last and last.report(),
        "live_tokens_per_s": engine.stats.live_tokens_per_s,
    }


def _time_split(engine: "Engine") -> dict[str, float | None]:
    """On an accelerator work is queued, not done, when a call returns: the parts of a decode step
    are not known there, only their sum."""
    split: dict[str, float | None] = dict(engine.stats.time_split())
    if engine.model.device.type != "cpu":
        parts = ("attention_s", "ffn_s", "head_s")
        split["other_s"] = sum(split[key] or 0.0 for key in (*parts, "other_s"))
        split |= dict.fromkeys(parts)
    return split


def _ffn_split(engine: "Engine") -> dict[str, float] | None:
    """The parts of `ffn_s`, from counters in the kernels; `rest_s` is norms and the calls."""
    times = engine.ffn_meter.times()
    if times is None:
        return None
    return {**times, "rest_s": max(0.0, engine.stats.times.ffn_s - sum(times.values()))}
