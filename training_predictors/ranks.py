"""How large each layer's predictor is: a rank for all, or what fits a budget in bytes."""

from __future__ import annotations

# The names in predictor.kinds, which would load torch.
KINDS = ("mlp", "svd", "gate-int8", "gate-int4", "sign")
RANKED_KINDS = ("mlp", "svd")
RANK_STEP = 16  # whole vector registers for the kernels
DEFAULT_SHARE = 0.2  # of the model width
FILE_OVERHEAD_PER_LAYER = 640  # safetensors header: six names, shapes and offsets


def predictor_bytes(rank: int, d_model: int, num_neurons: int) -> int:
    """int8 matrices, fp32 scales and biases of one layer, with its part of the file header."""
    return rank * (d_model + num_neurons) + 8 * (rank + num_neurons) + FILE_OVERHEAD_PER_LAYER


def choose_ranks(
    num_layers: int,
    d_model: int,
    num_neurons: int,
    *,
    rank: int | None = None,
    byte_budget: int | None = None,
) -> list[int]:
    """One rank per layer; a budget is for the file of all layers together."""
    largest = min(d_model, num_neurons)
    if rank is not None:
        if not 1 <= rank <= largest:
            raise ValueError(f"--rank must be from 1 to {largest} (the model width), is {rank}.")
        return [rank] * num_layers
    if byte_budget is None:
        wanted = round(DEFAULT_SHARE * d_model / RANK_STEP) * RANK_STEP
        return [min(largest, max(RANK_STEP, wanted))] * num_layers
    free = byte_budget // num_layers - predictor_bytes(0, d_model, num_neurons)
    fitting = free // (d_model + num_neurons + 8)
    if fitting < 1:
        needed = num_layers * predictor_bytes(1, d_model, num_neurons)
        raise ValueError(
            f"--byte-budget {byte_budget} is too small: rank 1 for {num_layers} layers takes "
            f"{needed} bytes."
        )
    rounded = fitting // RANK_STEP * RANK_STEP
    return [min(largest, rounded or fitting)] * num_layers


def parse_bytes(text: str) -> int:
    """'8MB' -> 8000000, '8MiB' -> 8388608, '8000000' -> 8000000."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    for unit, factor in sorted(units.items(), key=lambda item: -len(item[0])):
        if lowered.endswith(unit):
            return int(float(lowered.removesuffix(unit)) * factor)
    return int(lowered.removesuffix("b"))
