"""Text to ids and back: characters are never split, stop strings never shown in part."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.text import (
    BYTE_OF_CHAR,
    Detokenizer,
    StopStrings,
    TextCodec,
    TextError,
    UnsupportedTokenizer,
    load_tokenizer,
)

END = 258  # <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module")
def codec(tiny_model_dir: Path) -> TextCodec:
    return TextCodec(load_tokenizer(tiny_model_dir))


def test_the_byte_alphabet_has_every_byte_once() -> None:
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))


# text that spells a special token is that token, and special tokens are not shown
@given(text=st.text(max_size=40).filter(lambda text: "<|" not in text))
def test_streamed_pieces_are_the_text(codec: TextCodec, text: str) -> None:
    decoder = Detokenizer(codec)
    ids = codec.encode(text)
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@given(ids=st.lists(st.integers(0, 263), max_size=30))
def test_any_ids_decode_as_the_tokenizer_decodes_them(codec: TextCodec, ids: list[int]) -> None:
    decoder = Detokenizer(codec)
    streamed = "".join([decoder.feed(i) for i in ids]) + decoder.finish()
    plain = [i for i in ids if i < 256]
    assert streamed == bytes(plain).decode("utf-8", errors="replace")


def test_a_character_waits_for_its_last_byte(codec: TextCodec) -> None:
    decoder = Detokenizer(codec)
    assert [decoder.feed(i) for i in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_an_answer_cut_inside_a_character_ends_in_a_replacement(codec: TextCodec) -> None:
    decoder = Detokenizer(codec)
    assert [decoder.feed(i) for i in b"a\xf0\x9f"] == ["a", "", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_special_tokens_show_only_when_asked(codec: TextCodec) -> None:
    assert codec.decode([65, END]) == "A"
    assert codec.decode([65, END], skip_special_tokens=False) == "A<|im_end|>"


def test_tokens_as_text_and_bytes(codec: TextCodec) -> None:
    assert codec.token_bytes(0xC3) == b"\xc3"
    assert codec.token_text(0xC3) == "\ufffd"
    assert codec.token_text(END) == "<|im_end|>"
    assert codec.token_bytes(10**6) == b""


def _wrapped(backend: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_sentencepiece_tokens_become_bytes() -> None:
    vocab = {"\u2581Hi": 0, "<0xC3>": 1, "<0xA9>": 2, "\u2581": 3, "x": 4}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    codec = TextCodec(_wrapped(backend))
    assert codec.decode([0, 1, 2, 3, 4]) == " Hié x"


def test_a_tokenizer_without_fixed_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizer, match=r"WordPiece.*supported: ByteLevel"):
        TextCodec(_wrapped(backend))


def test_chat_template(codec: TextCodec) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert codec.render_chat(messages) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages.append({"role": "assistant", "content": "he"})
    text = codec.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nhe")


def test_a_missing_template_and_its_own_arguments_are_refused(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TextError, match="may not set tokenize"):
        TextCodec(tokenizer).render_chat(messages, template_kwargs={"tokenize": True})
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(TextError, match="no system messages"):
        TextCodec(tokenizer).render_chat(messages)
    tokenizer.chat_template = None
    with pytest.raises(TextError, match="no chat template; use /v1/completions"):
        TextCodec(tokenizer).render_chat(messages)


def _fed(stops: StopStrings, *pieces: str) -> list[str]:
    shown = []
    for piece in pieces:
        shown.append(stops.feed(piece))
        if stops.hit:
            return shown
    return [*shown, stops.finish()]


def test_a_stop_string_over_three_pieces_is_held_back() -> None:
    stops = StopStrings(["STOP"])
    assert _fed(stops, "go S", "TO", "P on") == ["go ", "", ""]
    assert stops.hit == "STOP"


def test_what_only_looked_like_a_stop_is_shown() -> None:
    stops = StopStrings(["STOP"])
    assert _fed(stops, "go S", "TA", "ST") == ["go ", "STA", "", "ST"]
    assert stops.hit is None


def test_the_earliest_of_several_stops_counts() -> None:
    stops = StopStrings(["cd", "bc"])
    assert _fed(stops, "abcd") == ["a"]
    assert stops.hit == "bc"
    assert _fed(StopStrings(["bc"], include=True), "abcd") == ["abc"]


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_pieces_do_not_matter_to_stops(text: str, stops: list[str], cuts: list[int]) -> None:
    """In pieces or at once: the text up to where the first stop string starts to be complete."""
    edges = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    watcher = StopStrings(stops)
    shown = "".join(_fed(watcher, *pieces))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if watcher.hit is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text[len(shown) :].startswith(watcher.hit)
