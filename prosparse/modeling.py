"""A Llama decoder written for training: plain functions over weight tuples, one compiled block.

Owns the forward pass inside `prosparse/` (decoding.py has its single-token form). It exists beside
`runtime/` because training wants what serving does not: autograd, whole-batch GEMMs, statistics of
x1 = act(gate) * up as it passes, and one `torch.compile`d function that all layers share (weights
are its arguments, so thirty layers compile once).

Dimension key: B rows, S positions, D model width, F neurons, H query heads, G kv heads, K head
width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from predictor.thresholds import read_thresholds

from .errors import BadInput

SPARSE_ACTIVATIONS = ("relu", "shifted_relu")


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-family checkpoint, read from its config.json."""

    num_layers: int
    d_model: int
    num_neurons: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    hidden_act: str
    thresholds: tuple[float, ...]  # FATReLU, by layer; 0 is plain ReLU

    @classmethod
    def from_folder(cls, folder: Path) -> LlamaShape:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "llama":
            raise BadInput(
                f"{folder}: model_type is {config.get('model_type')!r}; prosparse trains "
                "`llama` only"
            )
        if not config.get("tie_word_embeddings", False):
            raise BadInput(f"{folder}: prosparse needs tied word embeddings for now")
        hidden_act = "relu" if config["hidden_act"] == "fatrelu" else config["hidden_act"]
        if hidden_act not in ("silu", *SPARSE_ACTIVATIONS):
            raise BadInput(
                f"{folder}: hidden_act is {hidden_act!r}; prosparse knows silu, fatrelu, "
                + ", ".join(SPARSE_ACTIVATIONS)
            )
        try:
            thresholds = read_thresholds(config, config["num_hidden_layers"])
        except ValueError as error:
            raise BadInput(f"{folder / 'config.json'}: {error}") from error
        rope = config.get("rope_parameters") or {}
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            d_model=config["hidden_size"],
            num_neurons=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", heads),
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            hidden_act=hidden_act,
            thresholds=thresholds,
        )


class Merged(NamedTuple):
    """Rows of frozen matrices with their low-rank updates folded in: W_i + B_i A_i, stacked."""

    weight_OD: Tensor
    factors: tuple[Tensor, ...]  # A_0 [r, D], B_0 [O_0, r], A_1, B_1, ...


class BlockWeights(NamedTuple):
    """One decoder layer; fused matrices are [out, in]."""

    norm1_D: Tensor
    qkv_OD: Tensor | Merged
    out_DO: Tensor | Merged
    norm2_D: Tensor
    gate_up_FD: Tensor | Merged
    down_DF: Tensor | Merged


class _MergedLinear(torch.autograd.Function):
    """x (W + B A)^T whose gradient goes straight to A and B.

    Through the merged weight, its whole gradient [O, D] would be formed only to be projected:
    as much work as the forward product. dB = g^T (x A^T) and dA = (g B)^T x need a fraction of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OD, *factors)
        return F.linear(x, weight_OD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OD, *factors = ctx.saved_tensors
        grad = grads[0]
        x_ND, grad_NO = x.flatten(0, -2), grad.flatten(0, -2)
        to_factors: list[Tensor] = []
        row = 0
        for a_rD, b_Or in zip(factors[::2], factors[1::2], strict=True):
            part_NO = grad_NO[:, row : row + len(b_Or)]
            row += len(b_Or)
            to_factors += [(part_NO @ b_Or).T @ x_ND, part_NO.T @ (x_ND @ a_rD.T)]
        return grad @ weight_OD, None, *to_factors


def project(x: Tensor, w: Tensor | Merged) -> Tensor:
    """x W^T."""
    if isinstance(w, Merged):
        product: Tensor = _MergedLinear.apply(x, w.weight_OD, *w.factors)  # type: ignore[no-untyped-call]
        return product
    return F.linear(x, w)


LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")


def load_state(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder by their checkpoint names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def pack_block(state: dict[str, Tensor], layer: int) -> BlockWeights:
    """The weights of one layer, fused as `block` wants them."""
    w = {name: state[f"model.layers.{layer}.{name}.weight"] for name in LINEARS + NORMS}
    q, k, v, o, gate, up, down = (w[name] for name in LINEARS)
    return BlockWeights(
        w[NORMS[0]], torch.cat([q, k, v]), o, w[NORMS[1]], torch.cat([gate, up]), down
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype) * weight_D


def rope_tables(shape: LlamaShape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, K], for the half-split rotary embedding."""
    exponent = torch.arange(0, shape.head_width, 2, device=device).float() / shape.head_width
    angle = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHSK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    x32 = x_BHSK.float()
    lower, upper = x32.chunk(2, dim=-1)
    return (x32 * cos_SK + torch.cat([-upper, lower], dim=-1) * sin_SK).to(x_BHSK.dtype)


def split_heads(
    qkv_BSO: Tensor, shape: LlamaShape, cos_SK: Tensor, sin_SK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [B,H,S,K] and k [B,G,S,K], and v [B,G,S,K]."""
    batch, length, _ = qkv_BSO.shape
    h, g, k = shape.num_heads, shape.num_kv_heads, shape.head_width
    q_BSO, k_BSO, v_BSO = torch.split(qkv_BSO, [h * k, g * k, g * k], dim=-1)
    q = q_BSO.view(batch, length, h, k).transpose(1, 2)
    key = k_BSO.view(batch, length, g, k).transpose(1, 2)
    value = v_BSO.view(batch, length, g, k).transpose(1, 2)
    return rotate(q, cos_SK, sin_SK), rotate(key, cos_SK, sin_SK), value


def causal_attention(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """Causal attention with grouped keys, [B,H,S,K].

    Written out for a CPU: at the short rows of training, batched products plus a fused softmax are
    faster there than the library's flash kernel, forward and backward.
    """
    batch, heads, length, width = q_BHSK.shape
    groups = k_BGSK.shape[1]
    if q_BHSK.device.type != "cpu":
        return F.scaled_dot_product_attention(
            q_BHSK,
            k_BGSK.repeat_interleave(heads // groups, dim=1),
            v_BGSK.repeat_interleave(heads // groups, dim=1),
            is_causal=True,
        )
    q = q_BHSK.reshape(batch * groups, heads // groups * length, width)
    k = k_BGSK.reshape(batch * groups, length, width)
    v = v_BGSK.reshape(batch * groups, length, width)
    score = torch.bmm(q, k.transpose(1, 2)).view(batch * groups, heads // groups, length, length)
    position = torch.arange(length, device=q.device)
    future = position[None, :] > position[:, None]
    share = (score.float() * width**-0.5).masked_fill(future, float("-inf")).softmax(-1)
    mixed = torch.bmm(share.to(v.dtype).view(batch * groups, -1, length), v)
    return mixed.view(batch, heads, length, width)


def activate(gate: Tensor, hidden_act: str, threshold: Tensor | float) -> Tensor:
    """SiLU; ReLU and FATReLU: x where x > threshold, else 0 (ProSparse, section 3.2); shifted ReLU:
    max(x - threshold, 0) (Mirzadeh et al., "ReLU strikes back")."""
    if hidden_act == "silu":
        return F.silu(gate)
    passed = gate - threshold if hidden_act == "shifted_relu" else gate
    return torch.where(gate > threshold, passed, 0.0)


def gated(
    x_BSD: Tensor, w: BlockWeights, eps: float, hidden_act: str, threshold: Tensor | float
) -> Tensor:
    """x1 = act(gate) * up [B,S,F] of the residual stream."""
    normed = rms_norm(x_BSD, w.norm2_D, eps)
    gate, up = project(normed, w.gate_up_FD).chunk(2, dim=-1)
    return activate(gate, hidden_act, threshold) * up


Edit = Callable[[Tensor, BlockWeights], Tensor]


def block(
    x_BSD: Tensor,
    w: BlockWeights,
    cos_SK: Tensor,
    sin_SK: Tensor,
    threshold: Tensor,
    shape: LlamaShape,
    hidden_act: str,
    edit: Edit | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoder layer over whole rows: (x_BSD, mean |x1| [B,S], share of zeros of x1 [B,S]).

    `edit` sees x1 and the layer's weights, and returns the x1 to go on with.
    """
    batch, length, _ = x_BSD.shape
    normed = rms_norm(x_BSD, w.norm1_D, shape.norm_eps)
    q, k, v = split_heads(project(normed, w.qkv_OD), shape, cos_SK, sin_SK)
    mixed = causal_attention(q, k, v)
    x_BSD = x_BSD + project(mixed.transpose(1, 2).reshape(batch, length, -1), w.out_DO)
    h_BSF = gated(x_BSD, w, shape.norm_eps, hidden_act, threshold)
    if edit is not None:
        h_BSF = edit(h_BSF, w)
    l1_BS = h_BSF.abs().float().mean(-1)
    zeros_BS = (h_BSF == 0).float().mean(-1)
    return x_BSD + project(h_BSF, w.down_DF), l1_BS, zeros_BS


class Llama:
    """A frozen model for inference: the teacher, the evaluated student, the text sampler."""

    def __init__(
        self,
        folder: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        state: dict[str, Tensor] | None = None,
        shape: LlamaShape | None = None,
    ) -> None:
        """The checkpoint in `folder`, or another `state` and `shape` with its tokenizer."""
        self.folder = folder
        self.shape = shape or LlamaShape.from_folder(folder)
        self.device = torch.device(device)
        state = load_state(folder, dtype) if state is None else state
        state = {name: t.to(self.device) for name, t in state.items()}
        self.embed_VD = state["model.embed_tokens.weight"]
        self.final_norm_D = state["model.norm.weight"]
        self.blocks = [pack_block(state, layer) for layer in range(self.shape.num_layers)]
        self.set_thresholds(self.shape.thresholds)

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """FATReLU thresholds of the layers from now on."""
        self.threshold_L = self.embed_VD.new_tensor(list(thresholds))

    @torch.no_grad()
    def hidden(self, ids_BS: Tensor, run_block: Any = block) -> tuple[list[Tensor], Tensor, Tensor]:
        """Residual stream after each layer, and per layer mean |x1| and zeros of x1, [L,B,S]."""
        cos, sin = rope_tables(self.shape, ids_BS.shape[1], self.device)
        x_BSD = self.embed_VD[ids_BS]
        stream, l1s, zeros = [], [], []
        for weights, threshold in zip(self.blocks, self.threshold_L, strict=True):
            x_BSD, l1_BS, zeros_BS = run_block(
                x_BSD, weights, cos, sin, threshold, self.shape, self.shape.hidden_act
            )
            stream.append(x_BSD)
            l1s.append(l1_BS)
            zeros.append(zeros_BS)
        return stream, torch.stack(l1s), torch.stack(zeros)

    def logits(self, x: Tensor) -> Tensor:
        """Vocabulary logits, fp32, of residual-stream vectors [..., D]."""
        return F.linear(rms_norm(x, self.final_norm_D, self.shape.norm_eps), self.embed_VD).float()
