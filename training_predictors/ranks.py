"""How large each layer's predictor is: a rank for all, or what fits a budget in bytes."""

from __future__ import annotations

# The names in predictor.kinds, which would load torch.
KINDS = ("mlp", "mlp-int4", "svd", "gate-int8", "gate-int4", "sign")
TRAINED_KINDS = ("mlp", "mlp-int4")
RANKED_KINDS = (*TRAINED_KINDS, "svd")
RANK_STEP = 16  # whole vector registers for the kernels
GROUP = 32  # predictor.low_bits.GROUP
DEFAULT_SHARE = 0.2  # of the model width
FILE_OVERHEAD_PER_LAYER = 640  # safetensors header: six names, shapes and offsets


def predictor_bytes(rank: int, d_model: int, num_neurons: int, kind: str = "mlp") -> int:
    """Both matrices, scales and biases of one layer, with its part of the file header."""
    per_unit, fixed = _bytes_of(d_model, num_neurons, kind)
    return int(rank * per_unit + fixed)


def _bytes_of(d_model: int, num_neurons: int, kind: str) -> tuple[float, float]:
    """Of a hidden unit, and of a layer without any. Biases are fp32; scales are fp32, one a row, or
    in 4 bits fp16, one a group."""
    if kind == "mlp-int4":
        weight = 1 / 2 + 2 / GROUP
        return weight * (d_model + num_neurons) + 4, 4 * num_neurons + FILE_OVERHEAD_PER_LAYER
    return d_model + num_neurons + 8, 8 * num_neurons + FILE_OVERHEAD_PER_LAYER


def choose_ranks(
    num_layers: int,
    d_model: int,
    num_neurons: int,
    *,
    rank: int | None = None,
    byte_budget: int | None = None,
    kind: str = "mlp",
) -> list[int]:
    """One rank per layer; a budget is for the file of all layers together."""
    largest = min(d_model, num_neurons)
    if rank is not None:
        if not 1 <= rank <= largest:
            raise ValueError(f"--rank must be from 1 to {largest} (the model width), is {rank}.")
        return [rank] * num_layers
    step = GROUP if kind == "mlp-int4" else RANK_STEP
    if byte_budget is None:
        wanted = round(DEFAULT_SHARE * d_model / step) * step
        return [min(largest, max(step, wanted))] * num_layers
    per_unit, fixed = _bytes_of(d_model, num_neurons, kind)
    fitting = int((byte_budget // num_layers - fixed) // per_unit)
    least = step if kind == "mlp-int4" else 1  # there a group is filled up
    if fitting < least:
        needed = num_layers * predictor_bytes(least, d_model, num_neurons, kind)
        raise ValueError(
            f"--byte-budget {byte_budget} is too small: rank {least} for {num_layers} layers takes "
            f"{needed} bytes."
        )
    rounded = fitting // step * step
    return [min(largest, rounded or fitting)] * num_layers


def parse_bytes(text: str) -> int:
    """'8MB' -> 8000000, '8MiB' -> 8388608, '8000000' -> 8000000."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    for unit, factor in sorted(units.items(), key=lambda item: -len(item[0])):
        if lowered.endswith(unit):
            return int(float(lowered.removesuffix(unit)) * factor)
    return int(lowered.removesuffix("b"))
