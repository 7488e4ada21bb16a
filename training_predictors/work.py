"""The work folder of train-predictors: who holds it, what it was made for, how it is cleared.

`settings.json` is written first and removed first: without it nothing else in the folder counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from predictor.files import remove_partials, write_json
from training_predictors.documents import Document

SETTINGS_FILE = "settings.json"
LOCK_FILE = "lock"
WORK_FOLDERS = ("chats", "record", "train")


class WorkMismatch(ValueError):
    """The work folder belongs to another run, finished or going on."""


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the work folder for this process."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkMismatch(
                f"another train-predictors is at work in `{work}`; wait for it, or give another "
                "folder with --work."
            ) from error
        yield


def clear(work: Path) -> None:
    """Remove what this program put into the work folder, and the folder if nothing else is in."""
    forget(work)
    (work / LOCK_FILE).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def forget(work: Path) -> None:
    """Remove all stages' files, the settings first: without them whatever is left counts for
    nothing, so that a kill in the middle leaves no half of a recording that looks whole.
    """
    (work / SETTINGS_FILE).unlink(missing_ok=True)
    for name in WORK_FOLDERS:
        shutil.rmtree(work / name, ignore_errors=True)


def open_work(work: Path, facts: Mapping[str, Any], *, out: Path, restart: bool) -> None:
    """Make the work folder, or check that what it holds was recorded from the same things."""
    path = work / SETTINGS_FILE
    for folder in (work, *(work / name for name in WORK_FOLDERS), out):
        remove_partials(folder)
    if restart or not path.is_file():
        forget(work)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in facts if before.get(key) != facts[key]]
        if changed:
            raise WorkMismatch(
                f"`{work}` holds an unfinished run with other settings "
                f"({', '.join(f'{key}: {before.get(key)} -> {facts[key]}' for key in changed)}). "
                "Give the same ones to go on, `--restart` to throw it away, or another `--work`."
            )
        return
    write_json(path, facts)


def digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.key.encode())
    return f"{len(documents)} documents, sha256 {digest.hexdigest()[:16]}"
