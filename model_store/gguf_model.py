"""A GGUF file of the Llama architecture as Hugging Face config and weights.

Owns the map between the two formats' names, the dequantisation and the order of rotary rows.
The tokenizer is in `gguf_tokenizer`. Knows nothing of caches or adapters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UnsupportedFile
from .progress import Progress

if TYPE_CHECKING:
    from gguf import GGUFReader

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# Derived from the config by every loader; llama.cpp stores them for long-context variants only.
SCALED_ROPE_TENSORS = {"rope_freqs.weight"}


def open_gguf(path: Path) -> GGUFReader:
    """Open the file, refusing what is not a GGUF of the Llama architecture."""
    from gguf import GGUFReader  # late: the cache is of use without it

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UnsupportedFile(f"{path} cannot be read as GGUF ({error})") from error
    architecture = metadata(reader, "general.architecture", None)
    if architecture != "llama":
        raise UnsupportedFile(
            f"{path} has the architecture {architecture!r}: only GGUF files of 'llama' are read; "
            "give a Hugging Face folder of the model instead"
        )
    if any(tensor.name in SCALED_ROPE_TENSORS for tensor in reader.tensors):
        raise UnsupportedFile(
            f"{path} has scaled rotary frequencies, which are not read from GGUF: give a Hugging "
            "Face folder of the model instead"
        )
    return reader


_REQUIRED = object()


def metadata(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    """The value of one metadata key; without a default the key must be there."""
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise UnsupportedFile(f"the GGUF file lacks the metadata key {key!r}")
    return default


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """The config.json that `transformers` expects of a LlamaForCausalLM."""
    width = int(metadata(reader, "llama.embedding_length"))
    heads = int(metadata(reader, "llama.attention.head_count"))
    head_dim = int(metadata(reader, "llama.attention.key_length", width // heads))
    theta = float(metadata(reader, "llama.rope.freq_base", 10000.0))
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": int(metadata(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(metadata(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(metadata(reader, "llama.context_length")),
        # GGUF keeps the epsilon as float32: 9.999999747e-06 is meant to be 1e-05.
        "rms_norm_eps": float(f"{metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        # The old key and the new one: transformers changed the name in version 5.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id", None),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "bfloat16",
    }


def read_weights(
    reader: GGUFReader, config: dict[str, Any], progress: Progress
) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, dequantised to bfloat16."""
    from gguf.quants import dequantize

    weights: dict[str, torch.Tensor] = {}
    for tensor in progress.steps(reader.tensors, "reading weights"):
        name, heads = _hugging_face_name(tensor.name, config)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if heads:
            values = _undo_rope_order(values, heads)
        weights[name] = values.to(torch.bfloat16).contiguous()
    expected = len(TOP_NAMES) - config["tie_word_embeddings"]
    expected += config["num_hidden_layers"] * len(LAYER_NAMES)
    if len(weights) != expected:
        raise UnsupportedFile(
            f"the GGUF file has {len(weights)} weights, a Llama model of "
            f"{config['num_hidden_layers']} layers has {expected}: the file is incomplete"
        )
    return weights


def _hugging_face_name(name: str, config: dict[str, Any]) -> tuple[str, int]:
    """The weight's Hugging Face name, and its number of heads where rows are in rotary order."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], 0
    match = LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in LAYER_NAMES:
        raise UnsupportedFile(f"the GGUF file has a tensor that is not of a Llama model: {name}")
    layer, part = match[1], match[2]
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight", config[heads] if heads else 0


def _undo_rope_order(weight_OD: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each head's rows; Hugging Face keeps them apart."""
    pairs = weight_OD.reshape(heads, -1, 2, weight_OD.shape[1])
    return pairs.transpose(1, 2).reshape(weight_OD.shape)
