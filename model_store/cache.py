"""The cache folder: where it is, one writer at a time, and folders that appear whole or not at all.

Knows nothing of models. A folder made by `build_folder` carries a marker file with the key of
what it was made from; a folder whose key differs is made again.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .progress import Progress

MARKER = "hotneuron.json"
TRUE_WORDS = {"1", "true", "yes", "on"}


def cache_root() -> Path:
    """The cache folder: $HOTNEURON_CACHE, or ~/.cache/hotneuron."""
    configured = os.environ.get("HOTNEURON_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    return Path.home() / ".cache" / "hotneuron"


def is_offline() -> bool:
    """True when HOTNEURON_OFFLINE forbids any use of the network."""
    return os.environ.get("HOTNEURON_OFFLINE", "").strip().lower() in TRUE_WORDS


@contextmanager
def locked(root: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold the lock `name`; a second process waits here, and says that it does."""
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"waiting for another process that is preparing {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def marker_key(folder: Path) -> str | None:
    """The key the folder was made from, or None when it was not made by `build_folder`."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    key = marker.get("key") if isinstance(marker, dict) else None
    return key if isinstance(key, str) else None


def build_folder(target: Path, key: str, facts: object, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, mark it with `key`, then put it at `target`.

    The caller holds the lock. An interrupted write leaves nothing at `target`; what was there
    stays until the new folder is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(temporary)
        marker = json.dumps({"key": key, "made_from": facts}, indent=2) + "\n"
        (temporary / MARKER).write_text(marker)
        temporary.chmod(0o755)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(retired / "old")
            temporary.rename(target)
            shutil.rmtree(retired)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _remove_leftovers(target: Path) -> None:
    """Temporary folders of killed processes; ours alone, since the caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
