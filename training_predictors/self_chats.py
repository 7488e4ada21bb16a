"""Chats that a model writes itself: what to record when the user gives no texts.

The template's open user turn makes the model ask, the question makes it answer; both are sampled.
Chat i depends on the seed and i alone, and chats are kept in batches, so that an interrupted run
goes on and ends with the same chats.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from predictor.files import replacing
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import GenerationFailed
from runtime.sequence import Request, SamplingParams, TokenEvent
from training_predictors.documents import BadData
from training_predictors.progress import progress_bar

BATCH_CHATS = 16
QUESTION_TOKENS = 96
ANSWER_TOKENS = 320
TEMPERATURE = 0.9
TOP_K = 50
MAX_EMPTY_BATCHES = 3
PLACEHOLDER = "\ue000"  # a private-use character: no template has it


def write_chats(
    model_dir: Path,
    tokenizer: Any,
    folder: Path,
    *,
    num_tokens: int,
    context: int,
    seed: int,
    console: Console,
) -> None:
    """Fill `folder` with chats until their answers hold `num_tokens` tokens."""
    opening = open_user_turn(tokenizer)
    done = [_answer_tokens(file) for file in sorted(folder.glob("chats-*.jsonl"))]
    if sum(done) >= num_tokens:
        return
    engine = Engine.from_config(
        EngineConfig(model_dir, mode="exact", device="cpu", max_batch=BATCH_CHATS, audit_rate=0.0)
    )
    engine.start()
    try:
        with progress_bar(console, "write chats", num_tokens, sum(done)) as advance:
            while sum(done) < num_tokens:
                seeds = [seed + len(done) * BATCH_CHATS + index for index in range(BATCH_CHATS)]
                rows = _write_batch(engine, tokenizer, opening, seeds, context)
                with replacing(folder / f"chats-{len(done):05d}.jsonl") as partial:
                    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    partial.write_text("".join(lines), encoding="utf-8")
                done.append(sum(row["answer_tokens"] for row in rows))
                if sum(done[-MAX_EMPTY_BATCHES:]) == 0 and len(done) >= MAX_EMPTY_BATCHES:
                    raise BadData("the model writes no chats by itself; give texts with --data.")
                advance(done[-1], f"{len(done) * BATCH_CHATS} chats")
    finally:
        engine.stop()


def open_user_turn(tokenizer: Any) -> str:
    """The chat template up to where the user's words would begin."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadData("the model has no chat template to write chats with; give texts with --data.")
    text = str(
        tokenizer.apply_chat_template([{"role": "user", "content": PLACEHOLDER}], tokenize=False)
    )
    if PLACEHOLDER not in text:
        raise BadData("the chat template does not show the user's words; give texts with --data.")
    return text.split(PLACEHOLDER)[0]


def _write_batch(
    engine: Engine, tokenizer: Any, opening: str, seeds: Sequence[int], context: int
) -> list[dict[str, Any]]:
    questions = _generate(engine, [_ids(opening, tokenizer)] * len(seeds), seeds, QUESTION_TOKENS)
    chats = []
    for number, ids in zip(seeds, questions, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if text:
            chats.append((number, [{"role": "user", "content": text}]))
    prompts = [
        _ids(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
            tokenizer,
        )
        for _, messages in chats
    ]
    room = max(1, min(ANSWER_TOKENS, context - max(map(len, prompts), default=0)))
    answers = _generate(engine, prompts, [number for number, _ in chats], room)
    rows = []
    for (_, messages), ids in zip(chats, answers, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if text:
            answer = {"role": "assistant", "content": text}
            rows.append({"messages": [*messages, answer], "answer_tokens": len(ids)})
    return rows


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """One sampled continuation per prompt, without the end token."""
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    for index, (prompt, number) in enumerate(zip(prompts, seeds, strict=True)):
        sampling = SamplingParams(
            temperature=TEMPERATURE, top_k=TOP_K, seed=number, max_tokens=max_tokens
        )
        engine.submit(Request(str(index), tuple(prompt), sampling), events.put)
    results: list[list[int]] = [[] for _ in prompts]
    open_requests = len(prompts)
    while open_requests:
        event = events.get()
        if event.finish_reason in ("error", "abort"):
            raise GenerationFailed(event.error or "the engine stopped while writing chats")
        if event.token_id is not None and event.finish_reason != "stop":
            results[int(event.request_id)].append(event.token_id)
        open_requests -= event.finish_reason is not None
    return results


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_tokens(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(int(json.loads(line)["answer_tokens"]) for line in lines)
