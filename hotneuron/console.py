"""What the user sees on stderr: notes, warnings, errors. Standard output is for results."""

import errno
import sys

from rich.console import Console

# Named, not imported: an error of a package can only be raised once that package is loaded.
EXPECTED_ERRORS = {
    ("model_store.errors", "ModelStoreError"),
    ("runtime.errors", "HotneuronError"),
    ("predictor.files", "PredictorCorrupted"),
    ("predictor.checkpoint", "PredictorMismatch"),
    ("predictor.powerinfer", "BadPowerInferFile"),
    ("prosparse.errors", "BadInput"),
    ("server.text", "UnsupportedTokenizer"),
    ("server.text", "TextError"),
    ("runtime.kernels", "KernelUnavailable"),
    ("training_predictors.documents", "BadData"),
    ("hotneuron.console", "UserError"),
}


class UserError(ValueError):
    """The command cannot do what was asked; the text says why and what to do instead."""


def stderr() -> Console:
    """A console on stderr as it is now."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    stderr().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    stderr().print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def explain(error: BaseException) -> bool:
    """Print an error whose message was written for the user; False for any other (a bug)."""
    if not _is_expected(error):
        return False
    stderr().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    return True


def _is_expected(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT}
    for module, name in EXPECTED_ERRORS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return False
