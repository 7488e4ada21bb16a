"""What the user sees on stderr: notes, warnings, errors. Standard output is for results."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console

# Named, not imported: an error of a package can only be raised once that package is loaded.
EXPECTED_ERRORS = {
    ("model_store.errors", "ModelStoreError"),
    ("runtime.errors", "HotneuronError"),
    ("predictor.files", "DiskFull"),
    ("predictor.files", "PredictorCorrupted"),
    ("predictor.checkpoint", "PredictorMismatch"),
    ("predictor.powerinfer", "BadPowerInferFile"),
    ("prosparse.errors", "BadInput"),
    ("server.config", "InvalidSetting"),
    ("server.text", "UnsupportedTokenizer"),
    ("server.text", "TextError"),
    ("runtime.kernels", "KernelUnavailable"),
    ("training_predictors.documents", "BadData"),
    ("hotneuron.console", "UserError"),
}
EXPECTED_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT,
}  # fmt: skip


class UserError(ValueError):
    """The command cannot do what was asked; the text says why and what to do instead."""


def stderr() -> Console:
    """A console on stderr as it is now."""
    return Console(stderr=True, highlight=False)


_goes_to_log: ContextVar[bool] = ContextVar("goes_to_log", default=False)
log = logging.getLogger("hotneuron")


@contextmanager
def notes_as_log_records() -> Iterator[None]:
    """Within it, what is said here becomes log records: for logs that a machine reads.

    So does an error that was written for the user, which then ends the command.
    """
    token = _goes_to_log.set(True)
    try:
        yield
    except Exception as error:
        if explain(error):
            raise SystemExit(1) from error
        raise
    finally:
        _goes_to_log.reset(token)


def note(text: str) -> None:
    _say(logging.INFO, text, None)


def warn(text: str) -> None:
    _say(logging.WARNING, f"warning: {text}", "yellow")


def explain(error: BaseException) -> bool:
    """Print an error whose message was written for the user; False for any other (a bug)."""
    if not _is_expected(error):
        return False
    _say(logging.ERROR, f"error: {error}", "red")
    return True


def _say(level: int, text: str, style: str | None) -> None:
    if _goes_to_log.get():
        log.log(level, "%s", text)
    else:
        stderr().print(text, style=style, markup=False, soft_wrap=True)


def _is_expected(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in EXPECTED_ERRNOS:
        return True
    for module, name in EXPECTED_ERRORS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return False
