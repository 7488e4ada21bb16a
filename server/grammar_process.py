"""A process that tries grammars out, so that one which hangs or crashes the compiler harms nobody.

llguidance is native code that recurses: a schema of thousands of references in a chain ends its
process, and a grammar of a hundred nested groups never ends. Run as a script, for it must not
import the server. Lines of JSON: first the tokenizer, then specs; `{"source"}` or `{"error"}` out.
"""

import json
import sys
import threading
from typing import Any

import llguidance

STACK_BYTES = 4 << 20  # less than the server's threads have: what passes here passes there
# Without free white space a small model cannot fill its answer with it.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def limits() -> Any:
    """Tighter than llguidance's own in memory: its 250,000 lexer states are half a gigabyte."""
    return llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


def make_matcher(tokenizer: Any, source: str) -> Any:
    """A matcher with its first mask made: that is the dearest, and copies start with it.

    Raises ValueError with what the compiler complains of.
    """
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def source_of(kind: Any, text: str, is_lenient: bool) -> str:
    """The grammar in llguidance's own terms. Raises ValueError."""
    if kind != "json_schema":
        return llguidance.grammar_from(kind, text)
    options: Any = JSON_LAYOUT | {"lenient": is_lenient}
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options))


def _answer(tokenizer: Any, line: str) -> dict[str, str]:
    try:
        source = source_of(**json.loads(line))
        make_matcher(tokenizer, source)
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    return {"source": source}


def _serve() -> None:
    first = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(first["tokenizer"], eos_token=first["eos"] or None)
    for line in sys.stdin:
        print(json.dumps(_answer(tokenizer, line)), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
