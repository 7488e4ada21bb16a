"""One op, one signature: `reference` (the definition, torch fp32) and `cpu` (C++).

Chooses the backend once and loudly. Knows nothing of models or requests.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

__all__ = ["KernelUnavailable", "available_backends", "cpu_backend"]

logger = logging.getLogger(__name__)

HOW_TO_BUILD = (
    "Build it from the checkout with `make setup` or `pip install --no-build-isolation -e .` "
    "(needs a C++17 compiler and CMake), or run without it with `--kernels torch`."
)


class KernelUnavailable(RuntimeError):
    """A backend was asked for that this installation or machine cannot run; says what to do."""


def available_backends() -> tuple[str, ...]:
    """The backends that can run here: 'torch' always, 'cpu' if the extension was built."""
    try:
        cpu_backend()
    except KernelUnavailable:
        return ("torch",)
    return ("cpu", "torch")


def cpu_backend() -> ModuleType:
    """The module `runtime.kernels.cpu`, or KernelUnavailable with the reason and the fix."""
    try:
        return importlib.import_module(".cpu", __package__)
    except ImportError as error:
        raise KernelUnavailable(f"The C++ kernels cannot load: {error}. {HOW_TO_BUILD}") from error
