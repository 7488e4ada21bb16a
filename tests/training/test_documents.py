"""Texts to train on: given or written by the model, their pieces, order and splits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.support import make_plan, quiet, write_chats
from training_predictors import self_chats
from training_predictors.documents import (
    BadData,
    Document,
    assign_splits,
    load_documents,
    pieces_of,
)
from training_predictors.pipeline import load_tokenizer, run
from training_predictors.train import TrainSettings


def test_only_the_answers_of_a_chat_are_scored(sparse_model: Path) -> None:
    tokenizer = load_tokenizer(sparse_model)
    chat = Document(
        messages=(
            {"role": "user", "content": "why?"},
            {"role": "assistant", "content": "because"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "it rests"},
            {"role": "user", "content": "thanks"},
        )
    )
    (piece,) = pieces_of(chat, tokenizer, 512)
    scored = [token for token, is_scored in zip(piece.ids, piece.scored, strict=True) if is_scored]
    assert tokenizer.decode(scored) == "becauseit rests"
    assert tokenizer.decode(piece.ids).endswith("<|im_start|>assistant\nit rests")
    (cut,) = pieces_of(chat, tokenizer, len(piece.ids) - 3)
    assert cut.num_scored == piece.num_scored - 3
    text_pieces = pieces_of(Document(text="abcdefgh"), tokenizer, 3)
    assert [piece.num_scored for piece in text_pieces] == [2, 2, 1]


def test_bad_data_names_file_line_and_flag(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="--data"):
        load_documents([tmp_path / "missing.jsonl"], 0)
    with pytest.raises(BadData, match=r"no \.jsonl"):
        load_documents([tmp_path], 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"messages": 3}\n')
    with pytest.raises(BadData, match=r"bad\.jsonl` line 2"):
        load_documents([bad], 0)


def test_order_of_documents_depends_on_seed_and_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = write_chats(tmp_path / "a" / "chats.jsonl")
    lines = first.read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.jsonl").write_text("".join(reversed(lines[:12])))
    (tmp_path / "b" / "two.jsonl").write_text("".join(lines[10:]))
    assert load_documents([tmp_path / "a"], 1) == load_documents([tmp_path / "b"], 1)
    assert load_documents([tmp_path / "a"], 1) != load_documents([tmp_path / "a"], 2)


def test_without_data_the_model_writes_chats_that_do_not_depend_on_an_interrupt(
    sparse_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_chats, "ANSWER_TOKENS", 12)
    monkeypatch.setattr(self_chats, "QUESTION_TOKENS", 5)
    monkeypatch.setattr(self_chats, "BATCH_CHATS", 4)
    tokenizer = load_tokenizer(sparse_model)
    assert self_chats.open_user_turn(tokenizer) == "<|im_start|>user\n"
    facts: dict[str, Any] = {"context": 128, "seed": 3, "console": quiet()}
    once, twice = tmp_path / "once", tmp_path / "twice"
    self_chats.write_chats(sparse_model, tokenizer, once, num_tokens=90, **facts)
    self_chats.write_chats(sparse_model, tokenizer, twice, num_tokens=20, **facts)
    self_chats.write_chats(sparse_model, tokenizer, twice, num_tokens=90, **facts)
    files = {path.name: path.read_text() for path in once.iterdir()}
    assert files == {path.name: path.read_text() for path in twice.iterdir()}
    assert len(files) > 1
    rows = [json.loads(line) for text in files.values() for line in text.splitlines()]
    assert sum(row["answer_tokens"] for row in rows) >= 90
    assert len({row["messages"][0]["content"] for row in rows}) > 1
    plan = make_plan(sparse_model, tmp_path, data=(), tokens=90, rank=16)
    report = run(replace(plan, train=TrainSettings(epochs=1, batch_tokens=32)), quiet())
    assert report["made"]["texts"] == "chats written by the model itself"


def test_given_held_out_texts_alone_calibrate_and_test() -> None:
    texts = [Document(text=f"train {index}") for index in range(12)]
    unseen = [Document(text=f"unseen {index}") for index in range(5)]
    given = assign_splits([*texts, unseen[0]], unseen)
    assert {document for document, split in given if split == "train"} == set(texts)
    assert [d for d, split in given if split == "calibrate"] == unseen[0::2]
    assert [d for d, split in given if split == "test"] == unseen[1::2]
    assert [split for _, split in given[:10]] == [split for _, split in assign_splits(texts)[:10]]
    other = [Document(text=f"other {index}") for index in range(2)]
    mixed = assign_splits([*texts, other[0]], other=other)
    assert [split for _, split in mixed].count("other") == 2
    assert mixed[0] == (other[0], "other")
    # what does not carry the mark is split as if the other texts were not there
    assert [pair for pair in mixed if pair[1] != "other"] == assign_splits(texts)
