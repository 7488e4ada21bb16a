"""A disk that is full: one clear line that names the fix, and nothing half-written."""

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hotneuron.cli import main
from hotneuron.console import explain
from predictor.files import DiskFull
from predictor.powerinfer import write_counts
from prosparse.export import write_adapter, write_checkpoint
from training_predictors.__main__ import main as train_predictors

MakeModel = Callable[..., Path]
TENSORS = {"weight": torch.zeros(1000, 100)}  # 400 kB


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file may grow larger; the system says so as it says that a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_full_disk_while_artifacts_are_written(
    make_sparse_model: Callable[..., Path], tmp_path: Path
) -> None:
    """One clear line, exit status 1, and what was there before is untouched."""
    model, out = make_sparse_model("gate"), tmp_path / "placement.safetensors"
    out.write_bytes(b"the old one")
    command = [sys.executable, "-m", "hotneuron", "place", str(model), "--out", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: `{out}` cannot be written: File too large. Free some space" in done.stderr
    assert out.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_full_disk_is_an_error_for_the_user() -> None:
    for number, text in ((28, "No space left on device"), (122, "Disk quota exceeded")):
        assert explain(OSError(number, text))


def test_a_checkpoint_or_adapter_is_whole_or_not_there(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def write() -> None:
        write_adapter(tmp_path / "adapter", TENSORS, {"r": 8})

    def write_model() -> None:
        write_checkpoint(tmp_path / "model", tiny_model_dir, TENSORS, {"hidden_act": "relu"})

    for name, attempt in (("adapter", write), ("model", write_model)):
        with room_for(100_000), pytest.raises(DiskFull, match=rf"{name}`.*Free some space"):
            attempt()
        assert not list(tmp_path.iterdir())
    write()
    write_model()
    (tmp_path / "model" / "notes.txt").write_text("of the user")
    before = files_in(tmp_path)
    for attempt in (write, write_model):
        with room_for(100_000), pytest.raises(DiskFull):
            attempt()
        assert files_in(tmp_path) == before
        attempt()
        assert files_in(tmp_path) == before


def test_what_torch_writes_is_whole_or_not_there(tmp_path: Path) -> None:
    with room_for(100_000), pytest.raises(DiskFull, match="Free some space"):
        write_counts(tmp_path / "activation_0.pt", TENSORS["weight"])
    assert not list(tmp_path.iterdir())


def test_a_prosparse_run_goes_on_when_there_is_room_again(
    make_tiny_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out, text = make_tiny_model(hidden_act="silu"), tmp_path / "run", tmp_path / "text.txt"
    text.write_text("the neuron rests " * 100)
    recipe = tmp_path / "small.toml"
    recipe.write_text("row_length = 32\nrows_per_step = 2\nffn_rank = 8\nattention_rank = 4\n")
    words = ["prosparse", "train", str(dense), "--out", str(out), "--no-compile"]
    words += ["--config", str(recipe), "--tokens", "128", "--data", str(text)]
    before: dict[str, bytes] = {}
    for _ in range(2):
        with room_for(100_000):
            assert main(words) == 1
        err = capsys.readouterr().err
        assert f"`{out / 'checkpoint.pt'}` cannot be written: File too large. Free some" in err
        assert {name: data for name, data in files_in(out).items() if name in before} == before
        assert not list(out.glob(".*"))
        assert main(words) == 0
        kept = ("checkpoint.pt", "model/model.safetensors", "model/config.json")
        before = {name: data for name, data in files_in(out).items() if name in kept}
        assert len(before) == 3
    assert "resumed at step 2" in capsys.readouterr().err


def test_train_predictors_says_what_to_do(
    make_tiny_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for n in range(20):
        (texts / f"{n}.txt").write_text(f"{n} " + "gates open and close " * 10)
    words = [str(make_tiny_model(hidden_act_param=0.3)), "--data", str(texts), "--out", str(out)]
    words += ["--tokens", "300", "--rank", "16", "--epochs", "1", "--work", str(tmp_path / "work")]
    with room_for(20_000):
        assert train_predictors(words) == 1
    assert "Free some space on that disk" in capsys.readouterr().err
    assert not out.exists()
