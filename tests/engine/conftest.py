"""Engines around a tiny sparse model, stopped at the end of each test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime import Engine, EngineConfig

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(make_sparse_model: MakeModel) -> Path:
    return make_sparse_model("gate", tie_word_embeddings=False, hidden_act_param=0.2)


@pytest.fixture
def make_engine(folder: Path) -> Iterator[Callable[..., Engine]]:
    made = []

    def make(model_dir: Path = folder, **settings) -> Engine:
        config = EngineConfig(model_dir, **{"threads": 1, "max_context": 128, **settings})
        made.append(Engine.from_config(config))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
