"""From what the user typed to an engine with its model loaded."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from runtime import Engine, EngineConfig
    from runtime.config import Mode

MEASURED_TOKENS = 32


def find_model(name: str) -> Path:
    """The model's folder, made or downloaded if need be."""
    from model_store import resolve_model

    return resolve_model(name)


def load_engine(config: "EngineConfig") -> "Engine":
    """An engine that is not started yet; says how long loading took."""
    from runtime import Engine

    note(f"loading {config.model_dir}")
    start = time.perf_counter()
    engine = Engine.from_config(config)
    note(f"loaded in {time.perf_counter() - start:.1f} s")
    return engine


def measure_speeds(engine: "Engine") -> None:
    """Dense and current mode at batch 1, in this process; both become part of the report."""
    modes: list[Mode] = ["dense"]
    if engine.mode != "dense":
        modes.append(engine.mode)
    for mode in modes:
        result = engine.measure_speed(mode, new_tokens=MEASURED_TOKENS)
        note(f"measured {mode}: {result['tokens_per_s']:.1f} tokens/s")
