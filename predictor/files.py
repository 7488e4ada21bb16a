"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


class PredictorCorrupted(ValueError):
    """A file of the sparsity folder is missing, damaged or not of this format."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it takes the name `path` when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what `replacing` left in `folder` when its process was killed; not its subfolders."""
    for partial in folder.glob(".*.partial"):
        writer = partial.name.split(".")[-2]
        if writer.isdecimal() and not _is_running(int(writer)):
            partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    with replacing(path) as partial:
        partial.write_text(
            json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8"
        )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    is_private: bool = False,
) -> None:
    """Readable as the umask says, or by its owner alone."""
    with replacing(path) as partial:
        # save_file would make it readable by its owner alone, whatever the umask says.
        partial.touch(0o600 if is_private else 0o666)
        partial.write_bytes(save(dict(tensors), dict(metadata) if metadata else None))


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
