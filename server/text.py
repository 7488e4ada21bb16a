"""Between text and token ids: chat template, encoding, incremental decoding, stop strings.

Decoding works on bytes: every token stands for a fixed byte string, and an incremental UTF-8
decoder turns the bytes into text. So a character is never split, each token costs O(1), and the
text of a stream is the text of the whole answer.
"""

import codecs
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
WORD_START = "\u2581"  # SentencePiece writes a space as this


class UnsupportedTokenizer(ValueError):
    """The tokenizer's tokens do not stand for fixed byte strings."""


class TextError(ValueError):
    """A client's text cannot become token ids. `param` names the field it came in."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


def load_tokenizer(folder: Path) -> Any:
    """The `transformers` tokenizer of a model folder. Never goes to the network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class TextCodec:
    """Wraps a fast `transformers` tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedTokenizer(
                f"{type(tokenizer).__name__} is not a fast tokenizer; the model folder needs a "
                "tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._cache: dict[int, bytes] = {i: t.content.encode() for i, t in added.items()}
        self._special = {i for i, token in added.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self._is_byte_level = _is_byte_level(backend.decoder)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def facts(self) -> dict[str, Any]:
        """Names of special tokens (None: it has none), class, size and chat template."""
        tokenizer = self._tokenizer
        named = {
            name: getattr(tokenizer, name)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        special = [token for token in tokenizer.all_special_tokens if token not in named.values()]
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(with_added_tokens=True),
            "additional_special_tokens": special,
            "chat_template": tokenizer.chat_template,
            **named,
        }

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def template_has_tools(self) -> bool:
        """Whether the chat template describes tools, with calls in the form of `tools.py`."""
        template = str(self._tokenizer.chat_template)
        return "tools" in template and "<tool_call>" in template

    def knows(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def encode(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        if LONE_SURROGATE.search(text):
            raise TextError(f"{param} holds half a surrogate pair, which is no text", param=param)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        param: str = "messages",
    ) -> str:
        """The prompt text for a conversation. Raises TextError with the template's reason."""
        if not self.has_chat_template:
            raise TextError(
                "this model has no chat template; use /v1/completions, or add chat_template to "
                "the folder's tokenizer_config.json",
                param=param,
            )
        kwargs = dict(template_kwargs or {})
        own = set(inspect.signature(self._tokenizer.apply_chat_template).parameters) & set(kwargs)
        if own:
            names = ", ".join(sorted(own))
            raise TextError(f"chat_template_kwargs may not set {names}", param=param)
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=list(tools) or None,
                **kwargs,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise TextError(
                f"the chat template refused the messages: {error}", param=param
            ) from error
        return text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        decoder = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(decoder.feed(i) for i in token_ids) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; b"" for ids that the tokenizer does not know."""
        if token_id not in self._cache:
            self._cache[token_id] = self._token_bytes(token_id)
        return self._cache[token_id]

    def token_text(self, token_id: int) -> str:
        """The token alone as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return bytes(BYTE_OF_CHAR[char] for char in token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(WORD_START, " ").encode()


class Detokenizer:
    """Token ids in, whole characters out; bytes of an unfinished character wait inside."""

    def __init__(self, codec: TextCodec, *, skip_special_tokens: bool = True) -> None:
        self._codec = codec
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        if self._skip_special and self._codec.is_special(token_id):
            return ""
        return self._utf8.decode(self._codec.token_bytes(token_id))

    def finish(self) -> str:
        """What an answer cut inside a character leaves: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Watches a growing text for stop strings; holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Text that is certain not to belong to a stop string. After a hit `hit` names it."""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.hit = min(found)
            self._held = ""
            return text[: start + len(self.hit)] if self._include else text[:start]
        keep = longest_open_end(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def longest_open_end(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the start of one of `words`."""
    longest = min(len(text), max((len(word) for word in words), default=1) - 1)
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(word.startswith(end) for word in words):
            return size
    return 0


def _byte_of_char() -> dict[str, int]:
    """The byte alphabet of byte-level BPE: printable bytes are themselves, others shifted up."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return table


BYTE_OF_CHAR = _byte_of_char()


def _is_byte_level(decoder: Any) -> bool:
    """True for byte-level BPE, False for SentencePiece-like; anything else is refused."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback"}:
        return False
    raise UnsupportedTokenizer(
        f"tokenizer decoder {', '.join(sorted(kinds))} is not supported; supported: ByteLevel, "
        "Metaspace, ByteFallback"
    )
