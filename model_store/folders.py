"""Writing Hugging Face model folders and checking those that others wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import ModelNotFound, ModelStoreError


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """config.json and model.safetensors."""
    write_json(folder / "config.json", config)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise ModelStoreError(
            f"the weights cannot be written to {folder}: {error}. Free some space, or set "
            "HOTNEURON_CACHE to a folder on another disk"
        ) from error


def check_model_folder(folder: Path) -> Path:
    """The folder itself, if it looks like a Hugging Face model."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelNotFound(
            f"{folder} has no config.json, so it is no Hugging Face model folder: give the folder "
            "that holds config.json and *.safetensors"
        )
    try:
        config = json.loads(config_path.read_text())
    except json.JSONDecodeError as error:
        raise ModelNotFound(f"{config_path} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelNotFound(f"{config_path} has no model_type: it is not a model's config")
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFound(
            f"{folder} has no *.safetensors file: convert the weights to safetensors "
            "(`model.save_pretrained(folder)` in transformers writes them)"
        )
    return folder
