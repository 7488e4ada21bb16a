"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PredictorCorrupted(ValueError):
    """A file of the sparsity folder is missing, damaged or not of this format."""


class DiskFull(OSError):
    """Something does not fit on its disk; the text names it and says what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it takes the name `path` when the block ends without error.

    Raises DiskFull, also where safetensors or torch had to write.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with telling_of_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def telling_of_a_full_disk(path: Path) -> Iterator[None]:
    """Errors for want of room become DiskFull, which names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _errno_behind(error)
        if number not in NO_ROOM:
            raise
        raise DiskFull(
            f"`{path}` cannot be written: {os.strerror(number)}. Free some space on that disk, or "
            "write to another one."
        ) from error


def _errno_behind(error: BaseException | None) -> int | None:
    """safetensors has it in its text; torch fails after the file that it writes to."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return _errno_behind(error.__context__) if error else None


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
