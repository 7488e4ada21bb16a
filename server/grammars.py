"""Grammars of constrained decoding: which tokens may come next in an answer that must have a form.

A `GrammarBackend` compiles a `GrammarSpec` into a `Grammar`; each answer takes a `TokenMask` of its
own from it. The backend here is llguidance, which computes a mask on the CPU in well under a
millisecond and has no compile step worth speaking of.
"""

import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from runtime.token_mask import TokenMask

log = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 256 << 10
CACHED_GRAMMARS = 64
MAX_MESSAGE = 300  # characters of a compiler's complaint; it may quote the whole grammar

# Without free white space a small model cannot fill its answer with it.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        """Raises GrammarError. May take some 100 ms: not for the event loop."""
        ...


class LLGuidance:
    """llguidance over a Hugging Face tokenizer.json, made when first used. Safe across threads."""

    def __init__(self, tokenizer_json: str, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_ids = list(eos_token_ids)
        self._making = threading.Lock()
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

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import llguidance

        return llguidance.LLTokenizer(self._tokenizer_json, eos_token=self._eos_token_ids or None)

    def _compile(self, spec: GrammarSpec) -> Grammar:
        import llguidance

        with self._making:
            tokenizer = self._tokenizer
        try:
            source = _source(spec)
            matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        except (ValueError, RecursionError) as error:
            raise _complaint(spec, str(error)) from error
        # The first mask is the dearest: made here, and copies start with it.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _complaint(spec, matcher.get_error())
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

    def fill(self, bits_W: Any) -> None:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        size = min(len(words), len(bits_W))  # models pad their vocabulary
        bits_W.numpy()[:size] = words[:size]

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        """The matcher tells what went wrong, such as a limit that was hit, only when asked."""
        if self._matcher.is_error():
            raise GrammarError(_short(self._matcher.get_error()), param=self._param)


def _source(spec: GrammarSpec) -> str:
    import llguidance

    if spec.kind != "json_schema":
        return llguidance.grammar_from(spec.kind, spec.text)
    options: Any = JSON_LAYOUT | {"lenient": spec.is_lenient}
    source: str = llguidance.LLMatcher.grammar_from_json_schema(spec.text, overrides=options)
    return source


def _limits() -> Any:
    """Tighter than llguidance's own in memory: its 250,000 lexer states are half a gigabyte."""
    import llguidance

    return llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


def _complaint(spec: GrammarSpec, why: str) -> GrammarError:
    return GrammarError(f"{spec.param} cannot be compiled: {_short(why)}", param=spec.param)


def _short(why: str) -> str:
    return " ".join(why.split())[:MAX_MESSAGE]
