"""Text to train on, with no download: the dense model writes its own chats, folders add the rest.

A chat is sampled the way an instruction-tuned model remembers its training data: the prompt is the
chat template up to the open user turn, the model samples the question to its end mark, the
assistant header is forced, and the model samples the answer. All rows of a batch share one length
(a row in its forced header takes the given token instead of the sampled one), so the cache needs
neither padding nor masks.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decoding import DecodeCache, decode_step
from .errors import BadInput
from .modeling import Llama


@dataclass
class ChatSampling:
    """How the dense model writes its chats."""

    batch: int = 256
    temperature: float = 0.9
    top_k: int = 50
    max_question_tokens: int = 96
    max_answer_tokens: int = 320
    seed: int = 0


@dataclass
class _Row:
    question: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    asking: bool = True
    state: str = "open"  # open | complete | cut | dropped


def template_parts(tokenizer: Any) -> tuple[list[int], list[int], int]:
    """Ids before the open user turn, ids between question and answer, and the end-mark id.

    Found by rendering the chat template around marker words, so any template whose turns end with
    the tokenizer's EOS token works.
    """
    chat = [{"role": "user", "content": "QUESTION"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, after = text.split("QUESTION")
    end_mark = tokenizer.eos_token
    if not after.startswith(end_mark):
        raise ValueError(
            f"the chat template closes a user turn with {after[:20]!r}, not with the EOS token "
            f"{end_mark!r}; give ready-made chats with --data instead"
        )

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    return encode(before), encode(after)[1:], tokenizer.eos_token_id


def sample_top_k(logits_BV: Tensor, sampling: ChatSampling, generator: torch.Generator) -> Tensor:
    value_BK, index_BK = logits_BV.topk(sampling.top_k, dim=-1)
    share_BK = (value_BK.float() / sampling.temperature).softmax(-1)
    choice = torch.multinomial(share_BK, 1, generator=generator)
    return index_BK.gather(1, choice)[:, 0]


def read_questions(file: Path, seed: int) -> list[str]:
    """Questions to be answered, shuffled: one a line of a text file, or the groups of a TOML file.

    A group puts each of its `topics` into `per_topic` of its `templates` (see questions.toml).
    """
    chosen = random.Random(seed)
    if file.suffix == ".toml":
        questions = [
            template.format(topic)
            for group in tomllib.loads(file.read_text(encoding="utf-8"))["groups"]
            for topic in group["topics"]
            for template in chosen.sample(group["templates"], group["per_topic"])
        ]
    else:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        questions = [line for line in lines if line]
    if not questions:
        raise ValueError(f"{file} holds no question")
    chosen.shuffle(questions)
    return questions


def write_chats(
    model: Llama,
    tokenizer: Any,
    sampling: ChatSampling,
    batch_index: int = 0,
    questions: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One batch of self-written chats as {"messages", "complete", "tokens"}.

    A batch is taken whole: short chats end first, and stopping half-way would favour them. Batches
    of one seed differ by their index, so an interrupted corpus goes on where it stopped. With
    `questions`, one chat is written for each and only the answers are sampled.
    """
    prefix, between, end_id = template_parts(tokenizer)
    if questions is None:
        rows = [_Row() for _ in range(sampling.batch)]
    else:
        rows = [_asked(question, tokenizer, between, end_id) for question in questions]
    generator = torch.Generator(model.device).manual_seed(sampling.seed * 1_000_003 + batch_index)
    longest = max(sampling.max_question_tokens, *(len(row.question) for row in rows))
    max_length = len(prefix) + longest + len(between) + 2 + sampling.max_answer_tokens
    cache = DecodeCache(model, len(rows), max_length)
    chats: list[dict[str, Any]] = []
    logits = torch.empty(0)
    for token in prefix:
        logits = decode_step(model, cache, torch.full((len(rows),), token, device=model.device))
    while rows and cache.length < max_length:
        ids = sample_top_k(logits, sampling, generator).tolist()
        for i, row in enumerate(rows):
            ids[i] = _advance(row, ids[i], between, end_id, sampling)
        done = [row for row in rows if row.state != "open"]
        # dropping rows copies the cache, so wait until it pays
        if len(done) * 8 >= len(rows):
            chats += [_as_chat(row, tokenizer) for row in done if row.state != "dropped"]
            kept = [i for i, row in enumerate(rows) if row.state == "open"]
            rows = [rows[i] for i in kept]
            ids = [ids[i] for i in kept]
            if not rows:
                break
            cache.keep(torch.tensor(kept, device=model.device))
        logits = decode_step(model, cache, torch.tensor(ids, device=model.device))
    return chats + [_as_chat(row, tokenizer) for row in rows if row.answer]


def _asked(question: str, tokenizer: Any, between: list[int], end_id: int) -> _Row:
    """A row whose question is given: its tokens are forced, the answer follows."""
    ids = list(tokenizer(question, add_special_tokens=False)["input_ids"])
    return _Row(question=ids, forced=[*ids, end_id, *between], asking=False)


def _advance(
    row: _Row, sampled: int, between: list[int], end_id: int, sampling: ChatSampling
) -> int:
    """Take one step of a row's life; returns the token that enters the cache."""
    if row.state != "open":
        return end_id
    if row.forced:
        return row.forced.pop(0)
    if row.asking:
        if sampled == end_id:
            row.asking = False
            row.forced = list(between)
            row.state = "open" if len(row.question) >= 3 else "dropped"
            return end_id
        row.question.append(sampled)
        if len(row.question) > sampling.max_question_tokens:
            row.state = "dropped"
        return sampled
    if sampled == end_id:
        row.state = "complete" if row.answer else "dropped"
        return end_id
    row.answer.append(sampled)
    if len(row.answer) >= sampling.max_answer_tokens:
        row.state = "cut"
    return sampled


def _as_chat(row: _Row, tokenizer: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": tokenizer.decode(row.question).strip()},
            {"role": "assistant", "content": tokenizer.decode(row.answer).strip()},
        ],
        "complete": row.state == "complete",
        "tokens": len(row.question) + len(row.answer),
    }


TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".pod", ".html"}


def read_documents(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Documents of files and folders: chats ({"messages"}) from .jsonl, {"text"} from the rest."""
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES | {".jsonl"})
        elif path.is_file():
            files = [path]
        else:
            raise BadInput(f"no such file or folder: {path}")
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix == ".jsonl":
                for number, line in enumerate(text.splitlines(), 1):
                    if line.strip():
                        yield _json_document(line, file, number)
            elif text.strip():
                yield {"text": text}


def _json_document(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}:{number}: not JSON: {error}") from error
    if not isinstance(document, dict) or not ({"messages", "text"} & document.keys()):
        raise BadInput(f'{file}:{number}: expected {{"messages": [...]}} or {{"text": "..."}}')
    return document


def encode_document(document: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of one document as the model should see it: chats through the chat template."""
    return _encode([document], tokenizer)[0]


def _encode(documents: Sequence[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
    """In one call of the tokenizer: it has threads of its own."""
    texts = [
        tokenizer.apply_chat_template(document["messages"], tokenize=False)
        if "messages" in document
        else document["text"]
        for document in documents
    ]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for document, ids in zip(documents, encoded, strict=True):
        if not document.get("complete", True):
            # a cut answer must not teach that the answer ends there
            while ids and ids[-1] != tokenizer.eos_token_id:
                ids.pop()
            ids[-1:] = []
    return encoded


def encode_documents(
    paths: Sequence[Path], tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """(chats, texts) of files and folders as token ids."""
    documents = list(read_documents(paths))
    chats: list[list[int]] = []
    texts: list[list[int]] = []
    if documents:
        for document, ids in zip(documents, _encode(documents, tokenizer), strict=True):
            (chats if "messages" in document else texts).append(ids)
    return chats, texts


def pack_rows(documents: list[list[int]], length: int, end_id: int, seed: int) -> Tensor:
    """Shuffled documents as rows [rows, length] that begin where a document begins.

    A row goes on with the next documents until it is full; the one it cut opens the next row, so
    every document is seen whole and position 0 holds what it holds in serving. Documents longer
    than a row are cut into several first. Teacher and student see the same context, so a row that
    spans documents distils correctly.
    """
    pieces = [
        doc[start : start + length] for doc in documents for start in range(0, len(doc), length)
    ]
    pieces = [piece for piece in pieces if len(piece) >= 8]
    random.Random(seed).shuffle(pieces)
    rows: list[list[int]] = []
    row: list[int] = []
    i = 0
    while i < len(pieces):
        row += pieces[i] if pieces[i][-1] == end_id else [*pieces[i], end_id]
        if len(row) < length:
            i += 1
            continue
        rows.append(row[:length])
        cut_one = len(row) > length and len(row) - len(pieces[i]) > 1
        i += 0 if cut_one else 1
        row = []
    if not rows:
        raise ValueError(
            f"{sum(map(len, pieces))} tokens do not fill one row of {length}; add text with --data"
        )
    return torch.tensor(rows, dtype=torch.int32)


class RowOrder:
    """Which row comes when: a fixed function of the seed, so a resumed run sees the same rows."""

    def __init__(self, chats: Tensor, texts: Tensor | None, chat_share: float, seed: int) -> None:
        self.sources = [chats] if texts is None else [chats, texts]
        self.share = 1.0 if texts is None else chat_share
        self.random = random.Random(seed)
        self.queues: list[list[int]] = [[] for _ in self.sources]

    def next_rows(self, count: int) -> Tensor:
        rows = []
        for _ in range(count):
            which = 0 if self.random.random() < self.share else 1
            queue = self.queues[which]
            if not queue:
                queue.extend(range(len(self.sources[which])))
                self.random.shuffle(queue)
            rows.append(self.sources[which][queue.pop()])
        return torch.stack(rows).long()
