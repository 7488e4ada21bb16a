"""Stage 1: run texts through the runtime's own dense forward and keep what each FFN gets and does.

Owns the order of documents, their split and the shard files. The vector recorded is the very tensor
the FFN reads, because serving feeds the predictor that tensor. An interrupted run goes on after its
last complete shard and ends with the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from torch import Tensor

from predictor import ActivationProfile
from runtime.config import ModelConfig
from training_predictors.documents import BadData, Document, Piece, pieces_of
from training_predictors.progress import progress_bar
from training_predictors.recording import Recording, ShardBuffer

SHARD_BYTES = 96 << 20
MIN_DOCUMENTS = 3  # and one more where `other` texts are reported
MAX_DOCUMENT_PART = 20  # a document gives at most this fraction of the tokens, or one sequence

ForwardMode = Literal["dense", "exact", "predicted"]
Tap = Callable[[int, Tensor, Tensor], None]
ResidualTap = Callable[[int, Tensor], None]
LayerMode = Callable[[int, ForwardMode], ForwardMode]  # layer, the model's mode -> the layer's


class TapModel(Protocol):
    """What recording needs of runtime.Model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def down_norm_LF(self) -> Tensor: ...

    def forward(
        self,
        ids_N: Tensor,
        mode: ForwardMode = ...,
        tap: Tap | None = ...,
        all_logits: bool = ...,
        prompt_N: Tensor | None = ...,
        residual_tap: ResidualTap | None = ...,
        layer_mode: LayerMode | None = ...,
    ) -> Tensor: ...


def tapped_forward(
    model: TapModel,
    piece: Piece,
    on_layer: Tap,
    mode: ForwardMode = "dense",
    on_residual: ResidualTap | None = None,
) -> None:
    """Forward a piece; on_layer(layer, x_ND, h_NF) gets the scored tokens only.

    The others are prompt: they run dense in every mode, as the server runs them. In mode predicted
    this matters: what the first positions lose would show in all later ones. Before it,
    on_residual(layer, residual_ND) gets what the FFN's norm reads of the same tokens.
    """
    scored_N = torch.tensor(piece.scored)

    def tap(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
        on_layer(layer, x_ND[scored_N].float(), h_NF[scored_N].float())

    def residual_tap(layer: int, residual_ND: Tensor) -> None:
        if on_residual is not None:
            on_residual(layer, residual_ND[scored_N])

    model.forward(
        torch.tensor(piece.ids, dtype=torch.int64),
        mode=mode,
        tap=tap,
        all_logits=False,
        prompt_N=~scored_N,
        residual_tap=residual_tap,
    )


def scored_logits(
    model: TapModel, piece: Piece, mode: ForwardMode, layer_mode: LayerMode | None = None
) -> Tensor:
    """Logits [N, V] after each scored token, with the others read as prompt."""
    scored_N = torch.tensor(piece.scored)
    ids_N = torch.tensor(piece.ids, dtype=torch.int64)
    logits_NV = model.forward(ids_N, mode=mode, prompt_N=~scored_N, layer_mode=layer_mode)
    return logits_NV[scored_N]


def record(
    model: TapModel,
    tokenizer: Any,
    documents: Sequence[tuple[Document, str]],
    folder: Path,
    *,
    num_tokens: int,
    context: int,
    console: Console,
) -> Recording:
    """Fill `folder` with shards of (document, split) until `num_tokens` tokens are recorded."""
    num_layers, num_neurons = model.down_norm_LF.shape
    has_other = any(split == "other" for _, split in documents)
    min_documents = MIN_DOCUMENTS + has_other
    if len(documents) < min_documents:
        raise BadData(
            f"{len(documents)} document(s) found; at least {min_documents} are needed, because "
            "some are held out. Give more with --data (each chat of a JSONL file is one)."
        )
    facts = Recording(folder, num_neurons).facts()
    next_document = facts[-1]["next_document"] if facts else 0
    recorded = sum(fact["tokens"] for fact in facts)
    buffer = ShardBuffer(num_layers)

    def flush(next_document: int) -> None:
        nonlocal buffer
        path = folder / f"shard-{len(facts):05d}.safetensors"
        facts.append({"next_document": next_document, "tokens": len(buffer.split)})
        buffer.write(path, facts[-1])
        buffer = ShardBuffer(num_layers)

    if (recorded < num_tokens or next_document < min_documents) and next_document < len(documents):
        with progress_bar(console, "record", num_tokens, recorded) as advance:
            for index in range(next_document, len(documents)):
                document, split = documents[index]
                pieces = pieces_of(document, tokenizer, context)
                for piece in _first_tokens(pieces, num_tokens // MAX_DOCUMENT_PART):
                    _record_piece(model, piece, buffer, split)
                    recorded += piece.num_scored
                    advance(piece.num_scored, f"{index + 1} documents")
                next_document = index + 1
                if recorded >= num_tokens and next_document >= min_documents:
                    break
                if buffer.num_bytes >= SHARD_BYTES:
                    flush(next_document)
    if buffer.split:
        flush(next_document)
    recording = Recording(folder, num_neurons)
    _check_splits(recording, has_other)
    return recording


def _first_tokens(pieces: Sequence[Piece], limit: int) -> Iterator[Piece]:
    """The first piece, and more until `limit` tokens: one long text must not be all there is."""
    taken = 0
    for piece in pieces:
        if taken and taken + piece.num_scored > limit:
            return
        taken += piece.num_scored
        yield piece


def _check_splits(recording: Recording, has_other: bool) -> None:
    counts = recording.tokens_by_split()
    other = counts.pop("other")
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise BadData(
            f"too few documents with tokens to record: none is left to {' and '.join(empty)} the "
            "predictors. Give more with --data."
        )
    if has_other and other == 0:
        raise BadData("the texts of another kind hold no token to record; see --held-out-other.")


def profile_of(recording: Recording, num_layers: int) -> ActivationProfile:
    counts = recording.tokens_by_split()
    num_tokens = sum(counts.values()) - counts["other"]
    return ActivationProfile(recording.active_counts(num_layers), num_tokens)


def _record_piece(model: TapModel, piece: Piece, buffer: ShardBuffer, split: str) -> None:
    down_norm_LF = model.down_norm_LF.float().cpu()
    rms: dict[int, Tensor] = {}

    def keep_rms(layer: int, residual_ND: Tensor) -> None:
        mean_square_N = residual_ND.float().square().mean(-1)
        rms[layer] = (mean_square_N + model.config.rms_eps).sqrt().cpu()

    def keep(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
        buffer.add_layer(layer, x_ND.cpu(), rms[layer], h_NF.abs().cpu() * down_norm_LF[layer])

    tapped_forward(model, piece, keep, on_residual=keep_rms)
    buffer.add_tokens(split, piece.num_scored)
