"""PowerInfer's files: the same selection after import and export, and nothing unsafe is opened."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotneuron.cli import main
from predictor import ActivationProfile, MlpPredictor, PredictorSet, fingerprint, load_predictors
from predictor.checkpoint import save_predictors
from predictor.fingerprint import read_ffn_norm
from predictor.powerinfer import (
    BadPowerInferFile,
    BiasFreePredictor,
    layer_files,
    read_counts,
    read_predictor,
    unfolded,
)
from runtime import Engine, EngineConfig, SamplingParams
from runtime.kernels.cpu import CpuFfn

MakeModel = Callable[..., Path]
D, F, L, RANK = 64, 160, 12, 24
EPS = 1e-5


@pytest.fixture(scope="module")
def model(make_tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers: sorted as strings, layer 10 would come before layer 2."""
    made = make_tiny_model(num_hidden_layers=L)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("powerinfer") / "model"))


def random_matrices(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    return {
        "fc1.weight": torch.randn(RANK, D, generator=generator) / D**0.5,
        "fc2.weight": torch.randn(F, RANK, generator=generator) / RANK**0.5,
    }


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder as PowerInfer has it; layer i's neuron j fired i * 1000 + j times."""
    folder = tmp_path / "theirs"
    (folder / "activation").mkdir(parents=True)
    for layer in range(L):
        torch.save(random_matrices(layer), folder / f"model_{layer}.pt")
        counts_F = torch.arange(F) + 1000 * layer
        torch.save(counts_F, folder / "activation" / f"activation_{layer}.pt")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["predictors", *(str(word) for word in words)])
    return status, *capsys.readouterr()


def residual_stream(num_tokens: int) -> torch.Tensor:
    """Vectors of very different lengths, as before a norm."""
    scale_N1 = torch.logspace(-2, 2, num_tokens)[:, None]
    return torch.randn(num_tokens, D) * scale_N1


def normed(x_ND: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
    return x_ND * (x_ND.square().mean(1, keepdim=True) + EPS).rsqrt() * norm_D


def test_a_folded_predictor_selects_what_the_original_selects_before_the_norm() -> None:
    """In fp32 up to rounding: only scores within it of the threshold may fall on the other side."""
    norm_D = torch.randn(D) + 0.3  # of either sign, some small
    weights = random_matrices(3)
    original = BiasFreePredictor(weights["fc1.weight"], weights["fc2.weight"])
    x_ND = residual_stream(400)
    folded = original.folded(norm_D)
    before_NF, after_NF = original.select(x_ND), folded.select(normed(x_ND, norm_D))
    score_NF = torch.relu(x_ND.double() @ original.fc1_RD.double().T) @ original.fc2_FR.double().T
    size_NF = torch.relu(x_ND @ original.fc1_RD.T) @ original.fc2_FR.abs().T
    is_clear_NF = score_NF.abs() > 1e-4 * size_NF
    assert is_clear_NF.float().mean() > 0.99
    assert torch.equal(before_NF[is_clear_NF], after_NF[is_clear_NF])
    unfolded_mask_NF = original.select(normed(x_ND, norm_D))
    assert (unfolded_mask_NF != before_NF).float().mean() > 0.05  # the norm's weight matters


def test_int8_and_the_kernel_select_what_the_float_predictor_selects() -> None:
    """Weights that int8 holds without loss, so that only the arithmetic is compared."""
    fc1_RD = torch.randint(-127, 128, (RANK, D)).float()
    fc2_FR = torch.randint(-127, 128, (F, RANK)).float()
    fc1_RD[:, 0], fc2_FR[:, 0] = 127.0, 127.0
    fc2_FR[5] = 0  # its score is always 0, which reaches the threshold
    original = BiasFreePredictor(fc1_RD, fc2_FR)
    ours = original.as_mlp()
    x_ND = torch.randint(-8, 9, (64, D)).float()  # exact in fp32 whatever the order of sums
    x_ND[0] = 0
    expected_NF = original.select(x_ND)
    assert expected_NF[:, 5].all()
    assert expected_NF[0].all()  # PowerInfer skips where the score is below 0
    assert not expected_NF.all()
    assert torch.equal(ours.select(x_ND), expected_NF)
    gate_FD = torch.zeros(F, D)
    kernel = CpuFfn(gate_FD, gate_FD, gate_FD, 0.0, ours)
    assert torch.equal(kernel.select(x_ND), expected_NF)


def test_a_threshold_is_reached_not_exceeded() -> None:
    original = BiasFreePredictor(torch.ones(1, 1), torch.ones(1, 1), 2.0)
    x_ND = torch.tensor([[1.5], [2.0], [2.5]])
    assert original.select(x_ND)[:, 0].tolist() == [False, True, True]
    assert original.as_mlp().select(x_ND)[:, 0].tolist() == [False, True, True]


def test_import_then_serve(
    theirs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "served"))
    (folder / "sparsity").mkdir()
    (folder / "sparsity" / "report.json").write_text("of other predictors")
    status, out, err = run(capsys, "import", theirs, folder)
    assert status == 0, err
    assert "12 predictors of rank 24" in out
    predictors = load_predictors(folder / "sparsity", fingerprint=fingerprint(folder))
    made = predictors.manifest["made"]
    assert (made["by"], made["input"]) == ("import", "pre-norm, folded")
    assert min(made["agreement_with_float"]) > 0.97  # rank 24 and 8 bits
    assert not (folder / "sparsity" / "report.json").exists()
    x_ND = residual_stream(200)
    for layer in (2, 10, 11):
        weights = random_matrices(layer)
        wanted = BiasFreePredictor(weights["fc1.weight"], weights["fc2.weight"]).select(x_ND)
        got = predictors[layer].select(normed(x_ND, read_ffn_norm(folder, layer)))
        assert (wanted == got).float().mean() > 0.97
    profile = ActivationProfile.load(folder / "sparsity" / "profile.safetensors")
    assert profile.counts_LF[:, 7].tolist() == [1000 * layer + 7 for layer in range(L)]
    assert profile.num_tokens == 11_159
    engine = Engine.from_config(EngineConfig(folder, audit_rate=1.0))
    assert engine.mode == "predicted"
    engine.generate((1, 2, 3), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert 0.2 < engine.report()["mean"]["recall"] < 0.8  # random predictors, half the neurons


def test_export_and_import_give_the_same_selection(
    theirs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (Path(shutil.copytree(model, tmp_path / name)) for name in ("a", "b"))
    assert run(capsys, "import", theirs, first, "--tokens", 20_000)[0] == 0
    status, out, err = run(capsys, "export", first, tmp_path / "exported")
    assert status == 0, err
    assert "20000 tokens" in out
    assert not (tmp_path / "exported" / "config.json").exists()
    assert run(capsys, "import", tmp_path / "exported", second, "--tokens", 20_000)[0] == 0
    sets = [load_predictors(path / "sparsity", fingerprint=None) for path in (first, second)]
    x_ND = torch.randn(300, D)
    for before, after in zip(*sets, strict=True):
        assert torch.equal(before.fc1_q_RD, after.fc1_q_RD)
        assert torch.equal(before.fc2_q_FR, after.fc2_q_FR)
        assert torch.equal(before.select(x_ND), after.select(x_ND))
    for name in ("activation_3.pt", "activation_11.pt"):
        exported = tmp_path / "exported" / "activation" / name
        assert torch.equal(read_counts(exported, F), read_counts(theirs / "activation" / name, F))


def test_our_threshold_zero_is_told_apart_from_theirs() -> None:
    """Above 0 and from 0 on differ where the score is 0: where no hidden unit is open."""
    weights = random_matrices(0)
    parts = (weights["fc1.weight"], torch.zeros(RANK), weights["fc2.weight"], torch.zeros(F))
    for threshold in (0.0, BiasFreePredictor(parts[0], parts[2]).as_mlp().threshold):
        ours = MlpPredictor.from_float(*parts, threshold)
        exported = unfolded(ours, torch.ones(D))
        x_ND = torch.cat((torch.zeros(1, D), torch.randn(50, D)))
        assert torch.equal(exported.select(x_ND), ours.select(x_ND))
        assert bool(exported.select(x_ND)[0].all()) == (threshold < 0)
    with pytest.raises(BadPowerInferFile, match="biases"):
        unfolded(MlpPredictor.from_float(*parts[:3], torch.ones(F)), torch.ones(D))
    with pytest.raises(BadPowerInferFile, match="threshold"):
        unfolded(MlpPredictor.from_float(*parts, 0.5), torch.ones(D))


def test_what_export_cannot_hold_is_named_and_counts_are_written(
    make_sparse_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sparse_model("gate", hidden_act_param=0.2)  # thresholds 0.2
    status, _, err = run(capsys, "export", folder, tmp_path / "out")
    assert status == 1
    assert "3 of 3 predictors" in err
    assert "threshold is 0.2" in err
    assert "activation counts of 1000 tokens" in err
    assert sorted(p.name for p in (tmp_path / "out" / "activation").iterdir()) == [
        f"activation_{layer}.pt" for layer in range(3)
    ]
    assert not list((tmp_path / "out").glob("model_*"))
    status, _, err = run(capsys, "export", folder, tmp_path / "out")
    assert "give an empty folder" in err
    biased = make_sparse_model("all")
    assert "it has biases" in run(capsys, "export", biased, tmp_path / "biased")[2]


def test_import_does_not_replace_predictors_unasked(
    theirs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    assert run(capsys, "import", theirs, folder)[0] == 0
    status, _, err = run(capsys, "import", theirs, folder)
    assert (status, "--overwrite" in err) == (1, True)
    assert run(capsys, "import", theirs, folder, "--overwrite", "--input", "normed")[0] == 0
    made = load_predictors(folder / "sparsity", fingerprint=None).manifest["made"]
    assert made["input"] == "normed"
    assert run(capsys, "import", theirs, folder, "--out", tmp_path / "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_a_threshold_needs_predictors_of_the_normed_vector(
    theirs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs / "config.json").write_text(json.dumps({"sparse_threshold": 0.25}))
    out = ("--out", tmp_path / "out", "--overwrite")
    status, _, err = run(capsys, "import", theirs, model, *out)
    assert (status, "--threshold 0" in err) == (1, True)
    assert run(capsys, "import", theirs, model, *out, "--threshold", "0")[0] == 0
    assert run(capsys, "import", theirs, model, *out, "--input", "normed")[0] == 0
    predictor = load_predictors(tmp_path / "out", fingerprint=None)[4]
    assert predictor.threshold == pytest.approx(0.25)


class Evil:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_bad_files_are_refused_in_one_line(
    theirs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mark = tmp_path / "out", tmp_path / "mark"
    good = random_matrices(3)
    fc1, fc2 = good.values()
    path = theirs / "model_3.pt"
    data = path.read_bytes()
    cases: list[tuple[Any, str]] = [
        (data[:-300], "damaged"),
        (b"", "damaged"),
        (b"no pickle", "damaged"),
        (pickle.dumps(Evil(mark)), "more than tensors"),
        ({**good, "fc1.weight": Evil(mark)}, "more than tensors"),
        ({**good, "fc1.bias": torch.zeros(RANK)}, "fc1.bias"),
        ({"fc1.weight": fc1}, "must hold fc1.weight and fc2.weight"),
        ([fc1, fc2], "it holds list"),
        ({**good, "fc2.weight": fc2.T}, "belongs to another model"),
        ({**good, "fc1.weight": fc1[:, :-1]}, "belongs to another model"),
        ({**good, "fc1.weight": fc1.int()}, "floating-point"),
        ({**good, "fc1.weight": fc1 * float("nan")}, "not finite"),
    ]
    for value, message in cases:
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)
        status, _, err = run(capsys, "import", theirs, model, "--out", out)
        assert (status, err.count("\n")) == (1, 1), err
        assert message in err
        assert "model_3.pt" in err
    assert not out.exists()
    assert not mark.exists()


def test_layers_are_counted(theirs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in layer_files(theirs, "model", L)] == [
        f"model_{layer}.pt" for layer in range(L)
    ]
    (theirs / "model_12.pt").write_bytes(b"")
    assert "has model_12.pt, but the model has 12" in run(capsys, "import", theirs, model)[2]
    for name in ("model_12.pt", "model_5.pt", "model_11.pt"):
        (theirs / name).unlink()
    assert "lacks model_5.pt, model_11.pt" in run(capsys, "import", theirs, model)[2]


def test_counts_must_be_counts(theirs: Path, model: Path, tmp_path: Path) -> None:
    path = theirs / "activation" / "activation_0.pt"
    for value in (
        torch.ones(F + 1), torch.ones(F) / 2, -torch.ones(F), torch.full((F,), float("nan")), "no",
    ):  # fmt: skip
        torch.save(value, path)
        with pytest.raises(BadPowerInferFile, match="activation_0"):
            read_counts(path, F)
    torch.save(torch.full((F,), 3.0, dtype=torch.float16), path)
    assert read_counts(path, F).tolist() == [3] * F


def test_a_norm_weight_near_zero_does_not_round_the_others_away() -> None:
    """Real models have such dimensions; divided by them, fc1 has columns that dwarf the others."""
    norm_D = torch.full((D,), 0.2)
    norm_D[7], norm_D[9] = 1e-5, 0.0
    weights = random_matrices(0)
    original = BiasFreePredictor(weights["fc1.weight"], weights["fc2.weight"])
    x_ND = residual_stream(400)
    x_ND[:, 9] = 0  # behind the norm it is gone
    wanted_NF = original.select(x_ND)
    folded = original.folded(norm_D)
    assert torch.isfinite(folded.fc1_RD).all()

    def agreement(ours: MlpPredictor) -> float:
        return float((ours.select(normed(x_ND, norm_D)) == wanted_NF).float().mean())

    assert agreement(folded.as_mlp()) < 0.8
    assert agreement(folded.as_mlp(norm_D)) > 0.93  # one dimension of 64 is lost


def test_half_precision_and_old_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model_0.pt"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {name: value.to(dtype) for name, value in random_matrices(0).items()}
        for zipped in (True, False):
            torch.save(weights, path, _use_new_zipfile_serialization=zipped)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read = read_predictor(path, D, F)
            assert torch.equal(read.fc1_RD, weights["fc1.weight"].float())


def test_different_thresholds_cannot_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    layers = [
        MlpPredictor.from_float(
            *(random_matrices(i)["fc1.weight"], torch.zeros(RANK)),
            *(random_matrices(i)["fc2.weight"], torch.zeros(F)),
        )
        for i in range(L)
    ]
    layers[4] = layers[4].with_threshold(
        BiasFreePredictor(*random_matrices(4).values()).as_mlp().threshold
    )
    save_predictors(folder / "sparsity", PredictorSet(layers, {"fingerprint": fingerprint(folder)}))
    status, _, err = run(capsys, "export", folder, tmp_path / "out")
    assert (status, "different thresholds" in err) == (1, True)
