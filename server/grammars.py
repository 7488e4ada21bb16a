"""Grammars of constrained decoding: which tokens may come next in an answer that must have a form.

A `GrammarBackend` compiles a `GrammarSpec` into a `Grammar`; each answer takes a `TokenMask` of its
own from it. The backend here is llguidance, which computes a mask on the CPU in well under a
millisecond.
"""

import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from runtime.token_mask import TokenMask

from .grammar_trial import GrammarTrial

log = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 256 << 10
CACHED_GRAMMARS = 64
# An ambiguous grammar may take tens of milliseconds for each token, and all others wait meanwhile.
SOON_SECONDS = 0.005
MAX_LATE_SECONDS = 1.0  # that one answer's tokens may take in all beyond that
MAX_MESSAGE = 300  # characters of a compiler's complaint; it may quote the whole grammar


class GrammarError(ValueError):
    """A schema or grammar that cannot be compiled. `param` names the field it came in."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer must look like. `text` is a JSON Schema, a regular expression (Rust syntax),
    or a context-free grammar in Lark's or GBNF's syntax."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    param: str
    is_lenient: bool = False  # keywords of a schema that cannot be enforced are left out
    part: "GrammarSpec | None" = None  # compiled first, so that what is wrong in it names its param


class Grammar(Protocol):
    def mask(self) -> TokenMask:
        """A mask at the start of the grammar, for one answer."""
        ...


class GrammarBackend(Protocol):
    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises GrammarError. May take seconds: not for the event loop."""
        ...

    def close(self) -> None:
        """Give back what was taken to compile."""
        ...


class LLGuidance:
    """llguidance over a Hugging Face tokenizer.json, made when first used. Safe across threads.

    A grammar is tried in a process of its own first (`grammar_trial.py`); `close` ends that.
    """

    def __init__(self, tokenizer_json: str, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_ids = list(eos_token_ids)
        self._making = threading.Lock()
        self._trial = GrammarTrial(tokenizer_json, eos_token_ids)
        self._cached = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    def compile(self, spec: GrammarSpec) -> Grammar:
        size = len(spec.text.encode("utf-8", errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"{spec.param} has {size} bytes; a schema or grammar may have {MAX_GRAMMAR_BYTES}",
                param=spec.param,
            )
        if spec.part is not None:
            self.compile(spec.part)
        return self._cached(spec)

    def close(self) -> None:
        self._trial.close()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import llguidance

        return llguidance.LLTokenizer(self._tokenizer_json, eos_token=self._eos_token_ids or None)

    def _compile(self, spec: GrammarSpec) -> Grammar:
        from .grammar_process import make_matcher

        try:
            source = self._trial.source(spec.kind, spec.text, spec.is_lenient)
            with self._making:
                tokenizer = self._tokenizer
            matcher = make_matcher(tokenizer, source)
        except ValueError as error:
            why = _short(str(error))
            raise GrammarError(
                f"{spec.param} cannot be compiled: {why}", param=spec.param
            ) from error
        if warnings := matcher.get_grammar_warnings():
            log.warning("%s: not enforced: %s", spec.param, _short("; ".join(warnings)))
        return _LLGuidanceGrammar(matcher, spec.param)


class _LLGuidanceGrammar:
    """Holds a matcher that never moves."""

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def mask(self) -> TokenMask:
        return _LLGuidanceMask(self._matcher.deep_copy(), self._param)


class _LLGuidanceMask:
    """The `runtime.token_mask.TokenMask` of one answer."""

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher = matcher
        self._param = param
        self._late_seconds = 0.0

    def fill(self, bits_W: Any) -> None:
        with self._checked():
            words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        size = min(len(words), len(bits_W))  # models pad their vocabulary
        bits_W.numpy()[:size] = words[:size]

    def accept(self, token_id: int) -> None:
        with self._checked():
            self._matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """The matcher tells what went wrong, such as a limit that was hit, only when asked."""
        start = time.thread_time()
        yield
        self._late_seconds += max(0.0, time.thread_time() - start - SOON_SECONDS)
        if self._matcher.is_error():
            raise GrammarError(_short(self._matcher.get_error()), param=self._param)
        if self._late_seconds > MAX_LATE_SECONDS:
            raise GrammarError(
                "it takes too long to follow, as ambiguous ones do", param=self._param
            )


def _short(why: str) -> str:
    return " ".join(why.split())[:MAX_MESSAGE]
