"""An interrupted run goes on where it was, or says why it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.support import make_plan, quiet
from training_predictors.pipeline import Plan, run
from training_predictors.recording import Recording
from training_predictors.train import TrainSettings
from training_predictors.work import WorkMismatch, locked


class Interrupted(Exception):
    pass


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    """Everything but clock readings."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return found | {"curves.json": (folder / "curves.json").read_bytes()}


@pytest.mark.parametrize("stage", ["record", "train"])
def test_interrupted_run_goes_on_and_ends_with_the_same_files(
    finished: tuple[Plan, dict[str, Any]],
    sparse_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    reference, _ = finished
    plan = make_plan(sparse_model, tmp_path)
    monkeypatch.setattr("training_predictors.record.SHARD_BYTES", 1 << 18)
    calls = 0

    def interrupting(real: Callable[..., Any], limit: int) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Interrupted
            return real(*args, **kwargs)

        return wrapper

    module, name, limit = {
        "record": ("training_predictors.record", "tapped_forward", 13),
        "train": ("training_predictors.train", "train_layer", 2),
    }[stage]
    real = getattr(sys.modules[module], name)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, interrupting(real, limit))
        with pytest.raises(Interrupted):
            run(plan, quiet())
    assert not plan.out.exists()
    kept = list((plan.work / stage).glob("*.safetensors"))
    assert kept, "something was saved before the interrupt"
    documents_kept = Recording(plan.work / "record", 160).facts()[-1]["next_document"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, interrupting(real, 10**9))
        run(plan, quiet())
    documents = Recording(plan.work / "record", 160).facts()[-1]["next_document"]
    assert calls == {"record": documents - documents_kept, "train": 3 - 2}[stage]
    assert {path: path.stat().st_mtime_ns for path in kept} == before, "finished work was redone"
    assert artifact_bytes(plan.out) == artifact_bytes(reference.out)


def test_finished_work_folder_is_removed_and_other_settings_refuse_an_unfinished_one(
    finished: tuple[Plan, dict[str, Any]], sparse_model: Path, tmp_path: Path
) -> None:
    plan, _ = finished  # its work folder was kept
    with pytest.raises(WorkMismatch, match=r"tokens: 2000 -> 900.*--restart"):
        run(replace(plan, tokens=900, out=tmp_path / "out"), quiet())
    small = make_plan(
        sparse_model,
        tmp_path,
        tokens=600,
        keep_work=False,
        train=TrainSettings(epochs=1, batch_tokens=64),
    )
    run(replace(small, tokens=500, keep_work=True), quiet())
    (small.work / "mine.txt").write_text("not of this program")
    with locked(small.work), pytest.raises(WorkMismatch, match="another train-predictors"):
        run(replace(small, restart=True), quiet())
    run(replace(small, restart=True), quiet())
    assert [path.name for path in small.work.iterdir()] == ["mine.txt"]
    assert (small.out / "manifest.json").is_file()
