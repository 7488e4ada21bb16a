"""FATReLU thresholds in a config.json: `hidden_act_param`, one number or a list of one per layer.

The one reading of that key: the runtime, the fingerprint, training of predictors and `prosparse`
all take it from here, so a model means the same to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def read_thresholds(config: Mapping[str, Any], num_layers: int) -> tuple[float, ...]:
    """The threshold of each layer; absent or null is plain ReLU, 0. Raises ValueError by name."""
    value = config.get("hidden_act_param")
    values = value if isinstance(value, list) else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(
            f"hidden_act_param lists {len(values)} FATReLU thresholds for {num_layers} layers; "
            "give one number, or one per layer"
        )
    return tuple(_threshold(one) for one in values)


def config_value(thresholds: Sequence[float]) -> float | list[float]:
    """What config.json holds: a number if all layers agree, else the list."""
    return thresholds[0] if len(set(thresholds)) == 1 else list(thresholds)


def _threshold(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"hidden_act_param holds {value!r}; a FATReLU threshold is a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"hidden_act_param is the FATReLU threshold, at least 0; got {value}")
    return float(value)
