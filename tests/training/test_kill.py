"""kill -9 at any moment of train-predictors: the same command then ends with the same files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from predictor.files import remove_partials, replacing
from tests.training.support import write_chats
from training_predictors.work import SETTINGS_FILE, WORK_FOLDERS, clear, open_work

MakeModel = Callable[..., Path]
FLAGS = ("--tokens", "1200", "--epochs", "3", "--rank", "16", "--seed", "1", "--threads", "1")
SMALL_SHARDS = (
    "import sys; from training_predictors import record; record.SHARD_BYTES = 1 << 16; "
    "from training_predictors.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", count=20)


def start(model: Path, chats: Path, work: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [str(model), "--data", str(chats), "--work", str(work), "--out", str(out), *FLAGS]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def kill_during(process: subprocess.Popen[bytes], folder: Path, pattern: str, wait: float) -> bool:
    """SIGKILL `wait` seconds after a file of the stage shows; False if it ended before."""
    while not any(folder.glob(pattern)):
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def made_by(out: Path) -> dict[str, bytes]:
    """Everything but clock readings."""
    names = [*(path.name for path in out.glob("*.safetensors")), "curves.json"]
    return {name: (out / name).read_bytes() for name in names}


def test_killed_in_every_stage_it_ends_with_the_same_files(
    make_tiny_model: MakeModel, chats: Path, tmp_path: Path
) -> None:
    model = make_tiny_model(hidden_act="relu", hidden_act_param=0.3)
    work, out = tmp_path / "work", tmp_path / "out"
    rng = random.Random(0)
    undisturbed = start(model, chats, tmp_path / "work0", tmp_path / "out0")
    for folder, pattern in (
        (work / "record", "*.safetensors"),
        (work / "record", "*.partial"),
        (work / "train", "*.safetensors"),
        (out, "*"),
    ):
        process = start(model, chats, work, out)
        was_killed = kill_during(process, folder, pattern, rng.uniform(0, 0.02))
        assert was_killed or folder == out or pattern == "*.partial"
    finish(undisturbed)
    finish(start(model, chats, work, out))
    assert made_by(out) == made_by(tmp_path / "out0")
    assert not list(tmp_path.rglob(".*.partial"))


def test_half_a_removal_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while finished work is removed: what is left of a recording must not be gone on from.

    Neither at the end of a run nor under --restart, which remove the same things.
    """
    work = tmp_path / "work"
    for name in WORK_FOLDERS:
        (work / name).mkdir(parents=True)
    shards = [work / "record" / f"shard-{number:05d}.safetensors" for number in range(2)]
    for shard in shards:
        shard.write_bytes(b"tokens")
    (work / SETTINGS_FILE).write_text("{}")

    class Killed(BaseException):
        pass

    def half_of_it(folder: Path, **_: Any) -> None:
        if folder.name == "record":
            shards[0].unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_of_it)
        with pytest.raises(Killed):
            clear(work)
    assert shards[1].exists()
    open_work(work, {"fingerprint": "model"}, out=tmp_path / "out", restart=False)
    assert not shards[1].exists(), "half a recording would have been gone on from"
    assert (work / SETTINGS_FILE).is_file()


def test_partial_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".a.json.{ended.pid}.partial").write_text("half")
    (tmp_path / ".notes.partial").write_text("not ours")
    with replacing(tmp_path / "b.json") as partial:
        partial.write_text("of this process")
        remove_partials(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            f".b.json.{os.getpid()}.partial",
            ".notes.partial",
        ]
