"""A short name for "the model these predictors were trained on".

Covers what decides which neurons fire: sizes, activation with its thresholds, and per layer the
gate and the norm before it. Small gates are hashed whole; of large ones evenly spread blocks of
rows, so that a 7B model takes a second or so. Tensor bytes are hashed, not files: how a checkpoint
is split into shards does not matter.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .thresholds import config_value, read_thresholds

FINGERPRINT_VERSION = 1
MAX_BYTES_PER_GATE = 4 << 20
BLOCK_ROWS = 16

GATE_NAME = "model.layers.{layer}.mlp.gate_proj.weight"
NORM_NAME = "model.layers.{layer}.post_attention_layernorm.weight"


class FingerprintError(ValueError):
    """The folder is not a model whose neurons can be told apart."""


def fingerprint(model_dir: Path) -> str:
    """Hex name of the model in `model_dir`; equal for equal bytes, wherever the folder lies."""
    model_dir = Path(model_dir)
    facts = _config_facts(model_dir)
    files = _tensor_files(model_dir)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for layer in range(facts["num_layers"]):
        for name in (NORM_NAME.format(layer=layer), GATE_NAME.format(layer=layer)):
            if name not in files:
                raise FingerprintError(
                    f"`{model_dir}` has no tensor `{name}`: only gated Llama-family checkpoints "
                    "in safetensors are known. Check that the download is complete."
                )
            _hash_tensor(digest, files[name], name)
    return digest.hexdigest()[:32]


def _config_facts(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise FingerprintError(f"`{model_dir}` is not a model folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        activation = str(config["hidden_act"]).lower()
        num_layers = int(config["num_hidden_layers"])
        # ReLU with a threshold and FATReLU are one function under two names.
        if activation in ("relu", "fatrelu"):
            activation = "fatrelu"
        return {
            "version": FINGERPRINT_VERSION,
            "activation": activation,
            "threshold": config_value(read_thresholds(config, num_layers)),
            "num_layers": num_layers,
            "d_model": int(config["hidden_size"]),
            "num_neurons": int(config["intermediate_size"]),
            "norm_eps": float(config.get("rms_norm_eps", 0.0)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise FingerprintError(f"`{path}` is not a readable Llama config: {error!r}.") from error


def read_gate(model_dir: Path, layer: int) -> Tensor:
    """gate_FD of one layer, as stored."""
    return _read(model_dir, GATE_NAME.format(layer=layer))


def read_ffn_norm(model_dir: Path, layer: int) -> Tensor:
    """norm_D: the weights of the norm before one layer's FFN, as stored."""
    return _read(model_dir, NORM_NAME.format(layer=layer))


def _read(model_dir: Path, name: str) -> Tensor:
    with safe_open(_tensor_files(model_dir)[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _tensor_files(model_dir: Path) -> dict[str, Path]:
    """Where each tensor of the checkpoint lies."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: model_dir / file for name, file in weight_map.items()}
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise FingerprintError(f"`{model_dir}` has no model.safetensors (nor an index of shards).")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _hash_tensor(digest: hashlib._Hash, path: Path, name: str) -> None:
    with safe_open(path, framework="pt") as tensors:
        view = tensors.get_slice(name)
        shape = list(view.get_shape())
        digest.update(f"{name} {view.get_dtype()} {shape}".encode())
        for begin, end in _row_blocks(view, shape):
            digest.update(view[begin:end].contiguous().view(torch.uint8).numpy().tobytes())


def _row_blocks(view: Any, shape: list[int]) -> list[tuple[int, int]]:
    """All rows if they are few bytes, else blocks of BLOCK_ROWS spread evenly, ends included."""
    num_rows = shape[0]
    row_bytes = view[0:1].contiguous().view(torch.uint8).numel()
    if num_rows * row_bytes <= MAX_BYTES_PER_GATE:
        return [(0, num_rows)]
    num_blocks = max(2, MAX_BYTES_PER_GATE // (row_bytes * BLOCK_ROWS))
    last = num_rows - BLOCK_ROWS
    starts = sorted({round(i * last / (num_blocks - 1)) for i in range(num_blocks)})
    return [(start, start + BLOCK_ROWS) for start in starts]
