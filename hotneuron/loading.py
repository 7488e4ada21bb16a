"""From what the user typed to an engine with its model loaded."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from runtime import Engine, EngineConfig


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
    """Dense and current mode by turns at batch 1, in this process: the report's first speed-up."""
    for mode, speed in engine.compare_speed().report()["speeds"].items():
        note(f"measured {mode}: {speed['tokens_per_s']:.1f} tokens/s")
