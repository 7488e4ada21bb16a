"""Texts on disk -> token sequences, with a mark on the tokens that serving would predict.

A predictor works while a model generates, so of a chat only the assistant's tokens count, in the
very context that the server would build: the chat template's prompt, then the answer. Of plain text
every token but the first counts. Knows no model and writes no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

TEXT_SUFFIXES = (".txt", ".md")
DocumentKind = Literal["chats", "texts"]
# `other`: texts of another kind, which neither train nor calibrate and are only reported.
SPLITS = ("train", "calibrate", "test", "other")
# Of ten documents in a row, in their seeded order: one calibrates, one tests, eight train.
SPLIT_CYCLE = ("calibrate", "test") + ("train",) * 8


class BadData(ValueError):
    """The given texts cannot be used."""


@dataclass(frozen=True)
class Document:
    """One chat or one text: what the train / held-out split keeps together."""

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""

    @property
    def kind(self) -> DocumentKind:
        return "chats" if self.messages else "texts"

    @property
    def key(self) -> str:
        return json.dumps([self.messages, self.text], ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Piece:
    """A token sequence for one forward pass; `scored` marks the tokens to record."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]

    @property
    def num_scored(self) -> int:
        return sum(self.scored)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`; of folders, all texts and JSONL in them, sorted."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and file.suffix in (*TEXT_SUFFIXES, ".jsonl")
            )
        elif path.is_file():
            files.append(path)
        else:
            raise BadData(f"`{path}` does not exist (--data takes files and folders).")
    if not files:
        raise BadData(f"no .jsonl, .txt or .md file under {', '.join(map(str, paths))} (--data).")
    return files


def load_documents(paths: Sequence[Path], seed: int) -> list[Document]:
    """All documents, doubles removed, in an order that depends on `seed` and their text alone."""
    documents: dict[str, Document] = {}
    for file in find_files(paths):
        for document in _read_jsonl(file) if file.suffix == ".jsonl" else _read_text(file):
            rank = hashlib.sha256(f"{seed}\n{document.key}".encode()).hexdigest()
            documents[rank] = document
    return [documents[rank] for rank in sorted(documents)]


def assign_splits(
    documents: Sequence[Document],
    held_out: Sequence[Document] = (),
    other: Sequence[Document] = (),
) -> list[tuple[Document, str]]:
    """Each document with its split, in the order of recording.

    Given `held_out`, those alone calibrate and test. `other` go into a split of their own, one to
    a cycle. What is held out in either way trains nothing, even if `documents` has it too.
    """
    unseen = {document.key for document in (*held_out, *other)}
    own = [document for document in documents if document.key not in unseen]
    if held_out:
        of_split = {"train": own, "calibrate": held_out[0::2], "test": held_out[1::2]}
    else:
        of_split = {
            split: [
                document
                for index, document in enumerate(own)
                if SPLIT_CYCLE[index % len(SPLIT_CYCLE)] == split
            ]
            for split in set(SPLIT_CYCLE)
        }
    sources = {split: iter(group) for split, group in (of_split | {"other": other}).items()}
    result: list[tuple[Document, str]] = []
    while True:
        before = len(result)
        for split in ("other", *SPLIT_CYCLE) if other else SPLIT_CYCLE:
            result += [(document, split) for document in islice(sources[split], 1)]
        if len(result) == before:
            return result


def _read_text(file: Path) -> Iterator[Document]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.strip():
        yield Document(text=text)


def _read_jsonl(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                if "messages" in row:
                    messages = tuple(
                        {"role": str(message["role"]), "content": str(message["content"])}
                        for message in row["messages"]
                    )
                    if any(message["role"] == "assistant" for message in messages):
                        yield Document(messages=messages)
                elif str(row["text"]).strip():
                    yield Document(text=str(row["text"]))
            except (KeyError, TypeError, ValueError) as error:
                raise BadData(
                    f"`{file}` line {number} is neither a chat ({{'messages': [{{'role', "
                    f"'content'}}, ...]}}) nor a text ({{'text': ...}}): {error!r}."
                ) from error


def pieces_of(document: Document, tokenizer: Any, context: int) -> list[Piece]:
    """Sequences of at most `context` tokens with at least one scored token each."""
    if document.messages:
        piece = _chat_piece(document.messages, tokenizer, context)
        return [piece] if piece.num_scored else []
    ids = tokenizer(document.text)["input_ids"]
    chunks = [tuple(ids[begin : begin + context]) for begin in range(0, len(ids), context)]
    return [
        Piece(chunk, (False,) + (True,) * (len(chunk) - 1)) for chunk in chunks if len(chunk) > 1
    ]


def _chat_piece(messages: Sequence[dict[str, str]], tokenizer: Any, context: int) -> Piece:
    """The chat up to its last answer, as the server feeds it: prompt by template, then the answer.

    An earlier answer is scored too where the template leaves it as it was in the later prompt.
    """
    answers = [
        (_prompt_ids(messages[:index], tokenizer), _plain_ids(message["content"], tokenizer))
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index > 0
    ]
    if not answers:
        return Piece((), ())
    ids = answers[-1][0] + answers[-1][1]
    scored = [False] * len(ids)
    for prompt, answer in answers:
        end = len(prompt) + len(answer)
        if ids[:end] == prompt + answer:
            scored[len(prompt) : end] = [True] * len(answer)
    return Piece(tuple(ids[:context]), tuple(scored[:context]))


def _prompt_ids(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return _plain_ids(text, tokenizer)


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
