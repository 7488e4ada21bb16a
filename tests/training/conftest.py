"""A tiny sparse model, and predictors trained for it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.support import make_plan, quiet
from training_predictors.pipeline import Plan, run

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def sparse_model(make_tiny_model: MakeModel) -> Path:
    return make_tiny_model(hidden_act="relu", hidden_act_param=0.3)


@pytest.fixture(scope="session")
def finished(
    sparse_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, dict[str, Any]]:
    plan = make_plan(sparse_model, tmp_path_factory.mktemp("finished"))
    return plan, run(plan, quiet())
