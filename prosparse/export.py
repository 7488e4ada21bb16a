"""What a run leaves behind: a PEFT adapter folder and a Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

COPIED = {".json", ".jinja", ".model"}  # tokenizer and configuration


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """adapter_model.safetensors, whole or not at all, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_checkpoint(
    folder: Path, source: Path, state: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """`state` as a Hugging Face folder beside the tokenizer of `source`; `config` keys replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in COPIED and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    whole_config = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(whole_config, indent=2) + "\n")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    _write_tensors(folder / "model.safetensors", tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_suffix(".safetensors.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.rename(path)
