"""Types of request fields, and what happens to fields that a request model does not declare."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import Field, Strict

from .errors import unsupported

log = logging.getLogger(__name__)

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]

IsHarmless = Callable[[Any], bool]
Refusals = Mapping[str, tuple[IsHarmless, str]]
"""Field -> (values that change nothing, why all others are refused)."""


def is_empty(value: Any) -> bool:
    return value in (None, False, "", [], {})


def is_one_of(*values: Any) -> IsHarmless:
    return lambda value: value is None or value in values


def check_extra(
    extra: Mapping[str, Any], refused: Refusals, ignored: Collection[str], *, within: str = ""
) -> None:
    """Raises ApiError for a field whose neglect would change the answer. `within` is the path to
    the fields, with a dot at its end."""
    for name, value in extra.items():
        if name in refused:
            is_harmless, why = refused[name]
            if not is_harmless(value):
                raise unsupported(within + name, why)
        elif name not in ignored:
            _warn_once(within + name[:100])


@functools.lru_cache(maxsize=256)
def _warn_once(name: str) -> None:
    log.warning("ignoring the unknown request field %r", name)
