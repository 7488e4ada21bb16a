"""Whether a hybrid model computes what the CPU does: what bench_hybrid.py checks.

Logits cannot tell. With random weights and an activation that jumps at its threshold, whatever
moves one gate across it grows from layer to layer: in 32 layers of width 1024 the CPU's own logits
differ by 0.17 when embeddings differ by 1e-7, and by 0.45 when the prompt's vectors were rounded to
bf16. So each layer's FFN gets the same vector on both sides.
"""

import torch
from torch import Tensor

from runtime.model import Model

# Of a layer's FFN, relative: a gate or a score near its threshold may fall on the other side, which
# costs some percent; a wrong row or a lost part gives errors near 1.
MAX_LAYER_ERROR = 0.1


@torch.inference_mode()
def layer_errors(hybrid: Model, on_cpu: Model, ids: list[int], context: int) -> list[float]:
    """Relative error of each layer's FFN in mode predicted, over the vectors that these tokens,
    decoded one by one, bring to it in the hybrid model."""
    missed, sizes = ([0.0] * len(hybrid.layers) for _ in range(2))

    def compare(layer: int, x_ND: Tensor) -> None:
        y_ND = hybrid.layers[layer].ffn.forward(x_ND, "predicted").cpu()
        true_ND = on_cpu.layers[layer].ffn.forward(x_ND.cpu(), "predicted")
        missed[layer] += float((y_ND - true_ND).square().sum())
        sizes[layer] += float(true_ND.square().sum())

    cache = hybrid.new_cache(context)
    for token in ids:
        hybrid.decode([token], [cache], "predicted", tap=compare)
    return [(m / s) ** 0.5 for m, s in zip(missed, sizes, strict=True)]
