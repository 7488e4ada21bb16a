"""Checkpoint files to the model's weights: safetensors names, fusing, transposing, permuting.

The only place that knows Hugging Face tensor names. Reads tensor by tensor, and rounds each to 8 or
4 bits as it comes if that is asked for, so the peak is the model plus one tensor. Neuron i is row i
of gate, up and down (down is stored transposed); with an order given, rows are permuted hot-first
here and never remapped later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig
from .errors import UnsupportedModel

if TYPE_CHECKING:  # the extension may not be built
    from .kernels.quantized import Weight


@dataclass(frozen=True)
class FfnWeights:
    """The three rows of each neuron."""

    gate_FD: Weight
    up_FD: Weight
    down_FD: Weight

    def part(self, start: int, stop: int, device: torch.device) -> FfnWeights:
        """Neurons [start, stop) on a device (a view where they already are there)."""
        return FfnWeights(
            self.gate_FD[start:stop].to(device),
            self.up_FD[start:stop].to(device),
            self.down_FD[start:stop].to(device),
        )


@dataclass(frozen=True)
class LayerWeights:
    attention_norm_D: Tensor  # norms are fp32
    qkv_OD: Weight  # q, k and v stacked: one product
    out_DO: Weight
    ffn_norm_D: Tensor

    def to(self, device: torch.device) -> LayerWeights:
        return LayerWeights(
            self.attention_norm_D.to(device),
            self.qkv_OD.to(device),
            self.out_DO.to(device),
            self.ffn_norm_D.to(device),
        )


@dataclass(frozen=True)
class ModelWeights:
    embed_VD: Weight
    layers: tuple[LayerWeights, ...]
    ffns: tuple[FfnWeights, ...]  # in host memory; the layers' FFNs move their hot parts
    norm_D: Tensor
    head_VD: Weight  # the same object as embed_VD when tied

    def num_bytes(self) -> dict[str, int]:
        """What each kind of weights takes, wherever it lies."""
        ends = [self.embed_VD] if self.head_VD is self.embed_VD else [self.embed_VD, self.head_VD]
        return {
            "embeddings": sum(matrix.nbytes for matrix in ends),
            "attention": sum(layer.qkv_OD.nbytes + layer.out_DO.nbytes for layer in self.layers),
            "ffn": sum(
                ffn.gate_FD.nbytes + ffn.up_FD.nbytes + ffn.down_FD.nbytes for ffn in self.ffns
            ),
        }


class _Checkpoint:
    """All safetensors files of a folder as one mapping of names."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._file_of = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise UnsupportedModel(f"{path} is not a readable safetensors file: {error}; "
                                       "download the model again") from error  # fmt: skip
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def names(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self._file_of:
            raise UnsupportedModel(f"{self.folder} lacks the tensor {name}")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"{name} has shape {tuple(tensor.shape)}, config.json asks for {shape}"
            )
        if not tensor.is_floating_point():
            raise UnsupportedModel(
                f"{name} has dtype {tensor.dtype}; quantised weights are not run"
            )
        return tensor.to(dtype)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise UnsupportedModel(f"{path} is missing; the runtime reads safetensors checkpoints")
    return files


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    order_LF: Tensor | None = None,
    weight_bits: Literal[8, 4] | None = None,
    huge_pages: bool = False,
    kept_layers: Container[int] = (),
    keeps_embedding: bool = False,
) -> ModelWeights:
    """Everything but the FFN goes to `device`; of `kept_layers` nothing does, and the embedding
    not where it is to be kept (one row a token is looked up) and is not the head as well.

    `order_LF[l]` lists layer l's neurons hot-first. `weight_bits` rounds the matrices on the host;
    norms stay as they are, and embeddings and head, which every logit depends on, get no less than
    8 bits. `huge_pages`, for the C++ kernels, holds the FFNs, and without an accelerator
    all matrices.
    """
    keep_ffn = _huge_pages() if huge_pages else _as_is
    keep = keep_ffn if device.type == "cpu" else _as_is
    stored, stored_head = _storing(weight_bits, keep), _storing(weight_bits and 8, keep)
    D, V, K = config.d_model, config.vocab_size, config.head_dim
    H, G, num_neurons = config.num_heads, config.num_kv_heads, config.num_neurons
    with ExitStack() as stack:
        checkpoint = _Checkpoint(Path(folder), stack)
        _refuse_unknown(checkpoint)

        def matrix(name: str, rows: int, columns: int) -> Tensor:
            return checkpoint.read(name + ".weight", (rows, columns), dtype)

        def norm(name: str) -> Tensor:
            return checkpoint.read(name + ".weight", (D,), torch.float32)

        layers, ffns = [], []
        for l in range(config.num_layers):
            attention, mlp = f"model.layers.{l}.self_attn.", f"model.layers.{l}.mlp."
            qkv = [(f"{name}_proj", heads) for name, heads in (("q", H), ("k", G), ("v", G))]
            ffn = [
                matrix(mlp + "gate_proj", num_neurons, D),
                matrix(mlp + "up_proj", num_neurons, D),
                matrix(mlp + "down_proj", D, num_neurons).t().contiguous(),
            ]
            if order_LF is not None:
                ffn = [rows_FD[order_LF[l]] for rows_FD in ffn]
            ffns.append(_stored_ffn(ffn, weight_bits, keep_ffn))
            qkv_OD = torch.cat([matrix(attention + name, heads * K, D) for name, heads in qkv])
            layer = LayerWeights(
                norm(f"model.layers.{l}.input_layernorm"),
                stored(qkv_OD),
                stored(matrix(attention + "o_proj", D, H * K)),
                norm(f"model.layers.{l}.post_attention_layernorm"),
            )
            layers.append(layer if l in kept_layers else layer.to(device))
        embed_VD = stored_head(matrix("model.embed_tokens", V, D))
        if config.tie_embeddings or not keeps_embedding:
            embed_VD = embed_VD.to(device)
        head_VD = embed_VD
        if not config.tie_embeddings:
            head_VD = stored_head(matrix("lm_head", V, D)).to(device)
        norm_D = norm("model.norm").to(device)
        return ModelWeights(embed_VD, tuple(layers), tuple(ffns), norm_D, head_VD)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _huge_pages() -> Callable[[Tensor], Tensor]:
    from .kernels.cpu import HugePages

    return HugePages().copy


def _storing(
    bits: Literal[8, 4] | None, keep: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Weight]:
    if bits is None:
        return keep
    from .kernels.quantized import QuantizedMatrix

    return lambda weight_OD: QuantizedMatrix.of(weight_OD, bits, keep)


def _stored_ffn(
    ffn: list[Tensor], bits: Literal[8, 4] | None, keep: Callable[[Tensor], Tensor]
) -> FfnWeights:
    """Of gate, up and down; the last two side by side where the C++ kernels read them."""
    gate_FD, up_FD, down_FD = ffn
    if keep is _as_is:
        stored = _storing(bits, keep)
        return FfnWeights(stored(gate_FD), stored(up_FD), stored(down_FD))
    from .kernels.quantized import side_by_side

    rounded = _storing(bits, _as_is)
    up_and_down = side_by_side(rounded(up_FD), rounded(down_FD), keep)
    return FfnWeights(_storing(bits, keep)(gate_FD), *up_and_down)


def _refuse_unknown(checkpoint: _Checkpoint) -> None:
    """A tensor that would be ignored changes the model's answers: refuse, by name."""
    known = ("model.embed_tokens.", "model.norm.", "lm_head.")
    for name in checkpoint.names():
        part_of_layer = name.startswith("model.layers.") and name.endswith(".weight")
        if part_of_layer and not name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        if name.startswith(known) or name.endswith("rotary_emb.inv_freq"):
            continue
        raise UnsupportedModel(f"{checkpoint.folder} has the tensor {name}, which is not run")
