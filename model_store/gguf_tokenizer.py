"""The tokenizer inside a GGUF file as Hugging Face tokenizer files.

Byte-level BPE only (GGUF's "gpt2" kind); which regular expressions split the text first is a
table by GGUF's name for them. Knows nothing of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from .errors import UnsupportedFile
from .folders import write_json
from .gguf_model import metadata

if TYPE_CHECKING:
    from gguf import GGUFReader

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKEN_TYPES = {3}  # GGUF's "control"
USER_TOKEN_TYPE = 4
NORMAL_TOKEN_TYPE = 1
END_OF_TEXT_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in {"smollm", "starcoder", "refact"}:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, whole])
    if kind in {"gpt-2", "default"}:
        return whole
    if kind in {"llama-bpe", "llama3", "llama-v3"}:
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain])
    raise UnsupportedFile(
        f"the GGUF file's tokenizer splits text by the rules {kind!r}, which are not known here: "
        "give a Hugging Face folder of the model instead"
    )


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """The fast tokenizer of the file's tokens and merges."""
    kind = metadata(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedFile(
            f"the GGUF file's tokenizer is of the kind {kind!r}; only byte-level BPE ('gpt2') is "
            "read: give a Hugging Face folder of the model instead"
        )
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    types: list[int] = metadata(
        reader, "tokenizer.ggml.token_type", [NORMAL_TOKEN_TYPE] * len(tokens)
    )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata(reader, "tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=token_type in SPECIAL_TOKEN_TYPES, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in SPECIAL_TOKEN_TYPES or token_type == USER_TOKEN_TYPE
    ]
    tokenizer.add_tokens(added)
    bos = metadata(reader, "tokenizer.ggml.bos_token_id", None)
    if bos is not None and metadata(reader, "tokenizer.ggml.add_bos_token", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json."""
    build_tokenizer(reader).save(str(folder / "tokenizer.json"))
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        name: metadata(reader, f"tokenizer.ggml.{key}_token_id", None)
        for name, key in names.items()
    }
    config: dict[str, Any] = {
        # Not the Llama or GPT-2 class: those rebuild the splitting rules and ignore ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata(reader, "llama.context_length")),
        **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
    }
    template = metadata(reader, "tokenizer.chat_template", None)
    if template is not None:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    generation = {"bos_token_id": ids["bos"], "eos_token_id": end_of_text_ids(tokens, ids["eos"])}
    if ids["pad"] is not None:
        generation["pad_token_id"] = ids["pad"]
    write_json(folder / "generation_config.json", generation)


def end_of_text_ids(tokens: list[str], eos: int | None) -> list[int]:
    """All tokens that end an answer: the file's own first, then the known ones."""
    known = [tokens.index(token) for token in END_OF_TEXT_TOKENS if token in tokens]
    return list(dict.fromkeys([*([] if eos is None else [eos]), *known]))
