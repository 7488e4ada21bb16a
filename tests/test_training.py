"""record -> train -> calibrate -> report on a tiny model: quality, resume, refusals."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from predictor import ActivationProfile, RecallMeter, fingerprint, load_predictors
from runtime import Engine, EngineConfig, SamplingParams
from runtime.model import Model
from runtime.torch_ops import rms_norm
from training_predictors import self_chats
from training_predictors.__main__ import main
from training_predictors.compare import SHARES
from training_predictors.documents import (
    BadData,
    Document,
    assign_splits,
    load_documents,
    pieces_of,
)
from training_predictors.pipeline import (
    Plan,
    load_model,
    load_tokenizer,
    run,
)
from training_predictors.ranks import choose_ranks, parse_bytes, predictor_bytes
from training_predictors.record import record, tapped_forward
from training_predictors.recording import SPLITS, Recording, pack_bits, unpack_bits
from training_predictors.report import evaluate
from training_predictors.train import TrainSettings
from training_predictors.training_free import check_kind
from training_predictors.work import WorkMismatch, locked

MakeModel = Callable[..., Path]
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


@pytest.fixture(scope="session")
def sparse_model(make_tiny_model: MakeModel) -> Path:
    return make_tiny_model(hidden_act="relu", hidden_act_param=0.3)


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


@pytest.fixture(scope="session")
def finished(
    sparse_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, dict[str, Any]]:
    plan = make_plan(sparse_model, tmp_path_factory.mktemp("finished"))
    return plan, run(plan, quiet())


# the whole line


def test_predictors_reach_their_targets_and_beat_input_blind_masks(
    finished: tuple[Plan, dict[str, Any]],
) -> None:
    _, report = finished
    assert len(report["layers"]) == 3
    assert report["mean"]["recall"] > 0.91  # 0.94 on the calibration documents
    assert report["mean"]["energy_recall"] > 0.975  # 0.99
    for row in report["layers"]:
        assert row["recall"] > 0.78  # a layer may miss three times as much as all
        assert row["predicted_sparsity"] > 0.2
        for name in ("frequency", "previous_tokens", "random"):
            assert row["recall"] > row["baselines"][name]["recall"] + 0.02, name
            assert row["energy_recall"] > row["baselines"][name]["energy_recall"], name
        assert row["roc_auc"] > 0.8
        assert row["baselines"]["random"]["recall"] == pytest.approx(
            1 - row["predicted_sparsity"], abs=0.05
        )
    tokens = dict(report["made"]["tokens"])
    assert tokens.pop("other") == 0
    assert "other" not in report
    assert sum(tokens.values()) >= 2000
    assert min(tokens.values()) > 100
    fidelity = report["fidelity"]
    assert fidelity["tokens"] == tokens["test"]
    assert 0 < fidelity["kl"] < 0.1
    assert fidelity["top1_agreement"] > 0.8


def test_written_folder_is_complete_and_loads_for_its_model(
    finished: tuple[Plan, dict[str, Any]], sparse_model: Path
) -> None:
    plan, report = finished
    assert sorted(path.name for path in plan.out.iterdir()) == [
        "curves.json",
        "manifest.json",
        "predictors.safetensors",
        "profile.safetensors",
        "report.json",
    ]
    predictors = load_predictors(plan.out, fingerprint=fingerprint(sparse_model))
    assert [layer.rank for layer in predictors] == [32] * 3
    assert json.loads((plan.out / "report.json").read_text()) == report
    profile = ActivationProfile.load(plan.out / "profile.safetensors")
    assert profile.num_tokens == sum(report["made"]["tokens"].values())
    for layer, curve in enumerate(json.loads((plan.out / "curves.json").read_text())["layers"]):
        for key in ("recall", "energy_recall"):
            assert curve[key] == sorted(curve[key], reverse=True)
        assert curve["predicted_sparsity"] == sorted(curve["predicted_sparsity"])
        assert curve["recall"][0] > 0.99
        assert curve["recall"][-1] < 0.01
        assert 0.0 <= float(profile.frequency_LF[layer].mean()) <= 1.0


def test_evaluate_agrees_with_a_meter_run_by_hand(
    finished: tuple[Plan, dict[str, Any]], sparse_model: Path, tmp_path: Path
) -> None:
    plan, _ = finished
    chats = write_chats(tmp_path / "fresh.jsonl", count=5, seed=9)
    result = evaluate(sparse_model, [chats], sparsity_dir=plan.out, mode="dense")
    model, tokenizer = load_model(sparse_model), load_tokenizer(sparse_model)
    predictors = load_predictors(plan.out, fingerprint=None)
    meter = RecallMeter(3)
    for document in load_documents([chats], 0):
        for piece in pieces_of(document, tokenizer, 1024):

            def add(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
                selected_NF = predictors[layer].select(x_ND)
                meter.add(layer, h_NF, selected_NF, model.down_norm_LF[layer])

            tapped_forward(model, piece, add)
    assert result["mean"] == meter.report()["mean"]
    assert result["documents"] == 5
    assert "fidelity" not in result
    assert result["mean"]["recall"] > 0.9
    # as served: the first layer sees the same, later ones the misses of those before
    served = evaluate(sparse_model, [chats], sparsity_dir=plan.out)
    assert served["mode"] == "predicted"
    assert served["fidelity"]["tokens"] == served["mean"]["tokens"]
    assert served["layers"][0]["natural_sparsity"] == pytest.approx(
        result["layers"][0]["natural_sparsity"], abs=0.01
    )
    assert served["layers"][2]["recall"] != result["layers"][2]["recall"]
    assert served["mean"]["recall"] == pytest.approx(result["mean"]["recall"], abs=0.02)


# interrupt and resume


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


# the recorded vector is the served one


def test_recorded_input_is_what_the_ffn_gets(sparse_model: Path, tmp_path: Path) -> None:
    """The shards hold x such that act(gate x) is the recorded activity, by the raw weights."""
    model = Model.from_folder(sparse_model, dtype=torch.float32)
    tokenizer = load_tokenizer(sparse_model)
    documents = load_documents([write_chats(tmp_path / "chats.jsonl", count=6)], seed=0)
    recording = record(
        model,
        tokenizer,
        assign_splits(documents),
        tmp_path / "record",
        num_tokens=400,
        context=512,
        console=quiet(),
    )
    weights = load_file(sparse_model / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        gate_FD, up_FD, down_DF = (
            weights[f"{prefix}{name}_proj.weight"].float() for name in ("gate", "up", "down")
        )
        norm_D = weights[f"model.layers.{layer}.post_attention_layernorm.weight"].float()
        for split in SPLITS[:3]:
            data = recording.layer(layer, split)
            x_ND = data.x_ND.float()
            # the residual stream is what its norm makes the FFN's input of
            torch.testing.assert_close(
                rms_norm(data.residual_ND(norm_D), norm_D, 1e-5), x_ND, rtol=2e-3, atol=2e-3
            )
            gate_NF = x_ND @ gate_FD.T
            h_NF = torch.where(gate_NF > 0.3, gate_NF, 0.0) * (x_ND @ up_FD.T)
            clear_NF = (gate_NF - 0.3).abs() > 1e-2  # x is stored in fp16
            assert torch.equal((h_NF != 0)[clear_NF], data.active_NF[clear_NF])
            expected_NF = h_NF.abs() * down_DF.norm(dim=0)
            both_NF = clear_NF & data.active_NF
            torch.testing.assert_close(
                data.magnitude_NF.float()[both_NF], expected_NF[both_NF], rtol=5e-3, atol=5e-3
            )


def test_tap_gives_the_very_tensor_that_the_layers_ffn_reads(sparse_model: Path) -> None:
    model, tokenizer = load_model(sparse_model), load_tokenizer(sparse_model)
    assert isinstance(model, Model)
    (piece,) = pieces_of(
        Document(
            messages=(
                {"role": "user", "content": "the gate"},
                {"role": "assistant", "content": "is open"},
            )
        ),
        tokenizer,
        512,
    )
    seen: dict[int, Tensor] = {}
    tapped_forward(model, piece, lambda layer, x_ND, h_NF: seen.update({layer: x_ND.clone()}))
    read: dict[int, Tensor] = {}
    cache = model.new_cache(len(piece.ids))
    first = piece.scored.index(True)
    # the same tokens as serving runs them: the prompt at once, then one by one
    model.prefill(piece.ids[:first], cache)
    for position in range(first, len(piece.ids)):
        step: dict[int, Tensor] = {}
        model.decode(
            [piece.ids[position]], [cache], tap=lambda l, x, step=step: step.update({l: x})
        )
        for layer, x_ND in step.items():
            read[layer] = torch.cat([read[layer], x_ND]) if layer in read else x_ND.clone()
    for layer in range(3):
        torch.testing.assert_close(seen[layer], read[layer], rtol=0.03, atol=0.03)


# parts


def test_packed_bits_round_trip() -> None:
    mask_NF = torch.rand(5, 13) < 0.4
    assert torch.equal(unpack_bits(pack_bits(mask_NF), 13), mask_NF)
    assert pack_bits(mask_NF).shape == (5, 2)


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


def test_ranks_follow_the_budget() -> None:
    assert choose_ranks(30, 576, 1536) == [112] * 30
    assert choose_ranks(2, 576, 1536, rank=40) == [40, 40]
    ranks = choose_ranks(30, 576, 1536, byte_budget=parse_bytes("8MB"))
    assert 30 * predictor_bytes(ranks[0], 576, 1536) <= 8_000_000
    assert 30 * predictor_bytes(ranks[0] + 16, 576, 1536) > 8_000_000
    with pytest.raises(ValueError, match="--byte-budget"):
        choose_ranks(30, 576, 1536, byte_budget=1000)
    with pytest.raises(ValueError, match="--rank"):
        choose_ranks(30, 576, 1536, rank=600)
    assert parse_bytes("2 MiB") == 2 << 20
    assert parse_bytes("1.5kb") == 1500


# refusals


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


def test_command_refuses_dense_models_and_too_few_documents(
    make_tiny_model: MakeModel,
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    chats = write_chats(tmp_path / "chats.jsonl", count=2)
    dense = make_tiny_model(hidden_act="silu")
    flags = ["--data", str(chats), "--out", str(tmp_path / "out")]
    assert main([str(dense), *flags]) == 1
    assert "hotneuron prosparse" in capsys.readouterr().err
    assert main([str(sparse_model), *flags]) == 1
    assert "--data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_trains_and_prints_the_table(
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    chats = write_chats(tmp_path / "chats.jsonl", count=12)
    out = tmp_path / "out"
    flags = ["--data", str(chats), "--out", str(out), "--tokens", "500", "--epochs", "1"]
    assert main([str(sparse_model), *flags, "--rank", "16"]) == 0
    printed = capsys.readouterr().out
    assert "recall" in printed
    assert "frequency mask at the same predicted sparsity" in printed
    assert load_predictors(out, fingerprint=fingerprint(sparse_model)).layers[2].rank == 16
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


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


def test_one_long_text_does_not_fill_the_recording(sparse_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(sparse_model), load_tokenizer(sparse_model)
    documents = [Document(text=f"{index} " + "gate " * 400) for index in range(4)]
    facts: dict[str, Any] = {"context": 64, "console": quiet()}
    record(model, tokenizer, assign_splits(documents), tmp_path / "a", num_tokens=2000, **facts)
    recording = Recording(tmp_path / "a", 160)
    counts = recording.tokens_by_split()
    assert counts == {"calibrate": 63, "test": 63, "train": 126, "other": 0}
    with pytest.raises(BadData, match="none is left to train"):
        record(
            model,
            tokenizer,
            assign_splits([*documents[:2], Document(text="x")]),
            tmp_path / "b",
            num_tokens=2000,
            **facts,
        )


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


def test_compare_writes_all_kinds(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    words = [str(sparse_model), "--data", str(chats), "--out", str(tmp_path / "out"), "--compare"]
    words += ["--tokens", "300", "--epochs", "2", "--work", str(tmp_path / "work")]
    assert main(words) == 0
    comparison = json.loads((tmp_path / "out" / "kinds.json").read_text())
    assert comparison["fingerprint"] == fingerprint(sparse_model)
    kinds = comparison["kinds"]
    blind = ["frequency", "previous_tokens", "random"]
    peer = ["powerinfer", "powerinfer-own-size"]
    assert list(kinds) == ["mlp", "svd", "gate-int8", "gate-int4", "sign", *peer, *blind]
    assert kinds["mlp"]["bytes"] == kinds["svd"]["bytes"] == kinds["powerinfer"]["bytes"]
    assert kinds["powerinfer-own-size"]["bytes"] == 3 * 2 * 16 * (64 + 160)
    for name in peer:
        served = [kinds[name][f"served_{key}"] for key in ("predicted_sparsity", "energy_recall")]
        assert all(0 < value < 1 for value in served)
    # they see nothing: what they find grows with what they keep, and only with it
    assert kinds["random"]["recall"] == pytest.approx([1 - s for s in SHARES], abs=0.03)
    for kind in kinds.values():
        assert kind["energy_recall"] == sorted(kind["energy_recall"], reverse=True)
    printed = capsys.readouterr().out
    assert "gate-int4" in printed
    assert "powerinfer as it is served, at logit 0" in printed


def test_a_bound_on_answers_is_kept(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the calibration documents as measured; on others about so, and far below without it."""
    words = [str(sparse_model), "--data", str(write_chats(tmp_path / "chats.jsonl"))]
    words += ["--work", str(tmp_path / "work"), "--tokens", "600", "--threads", "1"]
    words += ["--kind", "svd", "--rank", "24", "--target-recall", "0.8"]
    words += ["--target-energy-recall", "0.8", "--out", str(tmp_path / "out")]
    found = {}
    for bound in (None, 0.002):
        flags = [] if bound is None else ["--target-kl", str(bound)]
        assert main([*words, *flags]) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["made"]["targets"]["kl"] == bound
        found[bound] = report["fidelity"]["kl"], report["mean"]["predicted_sparsity"]
    assert found[0.002][0] < 0.3 * found[None][0]  # 81 tokens are few to hold it to the bound
    assert 0 < found[0.002][1] < found[None][1]
    assert main([*words, "--target-kl", "1e-12"]) == 1
    assert "no thresholds keep the KL" in capsys.readouterr().err
    assert main([*words, "--target-kl", "0"]) == 1
    assert "must be above 0" in capsys.readouterr().err


# kinds without training


def test_every_kind_without_training_is_made_calibrated_and_served(
    sparse_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = Path(shutil.copytree(sparse_model, tmp_path / "model"))
    chats, out = write_chats(tmp_path / "chats.jsonl"), model_dir / "sparsity"
    words = [str(model_dir), "--data", str(chats), "--work", str(tmp_path / "work")]
    words += ["--tokens", "600", "--threads", "1", "--target-recall", "0.9"]
    num_bytes = {}
    for kind, rank in (("sign", None), ("svd", 32), ("gate-int8", None), ("gate-int4", None)):
        flags = ["--kind", kind] if rank is None else ["--kind", kind, "--rank", str(rank)]
        assert main([*words, *flags]) == 0
        predictors = load_predictors(out, fingerprint=fingerprint(model_dir))
        assert {layer.kind for layer in predictors} == {kind}
        report = json.loads((out / "report.json").read_text())
        assert report["made"]["kind"] == kind
        assert "train" not in report["made"]
        for row, layer in zip(report["layers"], predictors, strict=True):
            assert row["recall"] > 0.85  # 0.9 on the calibration documents
            assert row["bytes"] == layer.num_bytes
            assert row.get("rank") == rank
        num_bytes[kind] = report["mean"]["bytes"]
    assert num_bytes["sign"] < num_bytes["gate-int4"] < num_bytes["gate-int8"]
    assert report["mean"]["precision"] > 0.8, "four bits know the gate well"
    assert "recall" in capsys.readouterr().out
    config = EngineConfig(model_dir, mode="predicted", threads=1, max_context=64, audit_rate=1.0)
    engine = Engine.from_config(config)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        events = list(engine.generate(tuple(b"when the gate"), sampling))
        mean = engine.report()["mean"]
    finally:
        engine.stop()
    assert len([event for event in events if event.token_id is not None]) == 12
    assert 0.7 < mean["recall"] <= 1
    assert 0.1 < mean["predicted_sparsity"] < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "gate-int4", "--rank", "16"], "--rank given.*--kind mlp or svd"),
        (["--kind", "sign", "--byte-budget", "1MB"], "--byte-budget given.*--kind mlp or svd"),
        (["--kind", "svd", "--compare"], "--compare.*leave out --kind svd"),
    ],
)
def test_flags_that_do_not_fit_a_kind_are_refused(
    sparse_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    work = ["--work", str(tmp_path / "work")]
    assert main([str(sparse_model), "--out", str(tmp_path / "out"), *work, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_width_without_whole_groups_is_refused_before_recording() -> None:
    free: dict[str, Any] = {"rank": None, "byte_budget": None, "compare": False}
    for kind, width, step in (("gate-int4", 80, 32), ("gate-int8", 48, 32), ("sign", 20, 8)):
        check_kind(kind, 64, **free)
        with pytest.raises(ValueError, match=rf"{step} columns.*width {width}.*--kind mlp or svd"):
            check_kind(kind, width, **free)
    check_kind("svd", 20, **free)
