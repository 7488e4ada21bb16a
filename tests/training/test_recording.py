"""The recorded vector is the one that serving feeds to the FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runtime.model import Model
from runtime.torch_ops import rms_norm
from tests.training.support import quiet, write_chats
from training_predictors.documents import (
    BadData,
    Document,
    assign_splits,
    load_documents,
    pieces_of,
)
from training_predictors.pipeline import load_model, load_tokenizer
from training_predictors.record import record, tapped_forward
from training_predictors.recording import SPLITS, Recording, pack_bits, unpack_bits


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


def test_packed_bits_round_trip() -> None:
    mask_NF = torch.rand(5, 13) < 0.4
    assert torch.equal(unpack_bits(pack_bits(mask_NF), 13), mask_NF)
    assert pack_bits(mask_NF).shape == (5, 2)


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
