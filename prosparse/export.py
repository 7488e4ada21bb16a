"""What a run leaves behind: a PEFT adapter folder and a Hugging Face model folder.

Each is whole or not there: what does not fit on the disk is DiskFull and leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from predictor.files import telling_of_a_full_disk, write_json

COPIED = {".json", ".jinja", ".model"}  # tokenizer and configuration
PYTORCH = {"format": "pt"}  # what transformers asks a file for


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """adapter_model.safetensors and adapter_config.json."""
    with _filling(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata=PYTORCH)
        write_json(part / "adapter_config.json", config)


def write_checkpoint(
    folder: Path, source: Path, state: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """`state` as a Hugging Face folder beside the tokenizer of `source`; `config` keys replaced."""
    with _filling(folder) as part:
        for file in source.iterdir():
            if file.suffix in COPIED and "index" not in file.name:
                shutil.copy(file, part / file.name)
        whole_config = json.loads((part / "config.json").read_text()) | config
        write_json(part / "config.json", whole_config)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, part / "model.safetensors", metadata=PYTORCH)


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; its files move into `folder` when the block ends without error."""
    with telling_of_a_full_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
            yield Path(part)
            folder.mkdir(exist_ok=True)
            for file in Path(part).iterdir():
                file.replace(folder / file.name)
