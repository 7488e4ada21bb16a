"""What the tests of training share: texts, a plan, a console that says nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training_predictors.pipeline import Plan
from training_predictors.train import TrainSettings

WORDS = ("the", "neuron", "fires", "when", "its", "gate", "is", "open", "and", "rests", "else")


def quiet() -> Console:
    return Console(file=io.StringIO())


def write_chats(path: Path, count: int = 30, seed: int = 0) -> Path:
    rng = torch.Generator().manual_seed(seed)

    def sentence(length: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=rng))

    rows = [
        {
            "messages": [
                {"role": "user", "content": sentence(4)},
                {"role": "assistant", "content": sentence(16)},
            ]
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_plan(model_dir: Path, folder: Path, **changes: Any) -> Plan:
    plan = Plan(
        model_dir=model_dir,
        data=(write_chats(folder / "chats.jsonl"),),
        out=folder / "sparsity",
        work=folder / "work",
        tokens=2000,
        rank=32,
        train=TrainSettings(epochs=8, batch_tokens=128),
        keep_work=True,
    )
    return replace(plan, **changes)
