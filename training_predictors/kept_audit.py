"""Keeps the audit's samples of real traffic on disk, so that predictors can be trained on them.

Owns a folder of shards in the format of recording.py and its bound in bytes: the oldest shards go
when a new one would not fit. It holds FFN inputs and activity only, no text and no token ids; but
much of a text can be guessed from such vectors, so the files are their owner's alone. A request's
tokens all train or all are held out.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from training_predictors.documents import SPLIT_CYCLE, BadData
from training_predictors.recording import FP16_MAX, Recording, ShardBuffer

log = logging.getLogger(__name__)
MIN_BYTES = 1 << 20
MAX_SHARD_BYTES = 16 << 20
SHARDS_PER_BUDGET = 8  # what is dropped at once is at most this part
HEADER_BYTES_PER_LAYER = 400


class AuditKeeper:
    """An audit's sink: call it on the engine's thread; it writes on one of its own."""

    def __init__(
        self, folder: Path, fingerprint: str, num_layers: int, num_neurons: int, max_bytes: int
    ) -> None:
        """Raises BadData if `folder` holds something else than samples of this model."""
        if max_bytes < MIN_BYTES:
            raise BadData(
                f"--keep-audit-bytes {max_bytes} is too little; give at least {MIN_BYTES}."
            )
        self._folder, self._fingerprint, self._num_layers = folder, fingerprint, num_layers
        self._max_bytes = max_bytes
        self._shard_bytes = min(MAX_SHARD_BYTES, max_bytes // SHARDS_PER_BUDGET)
        if folder.exists() and not folder.is_dir():
            raise BadData(f"`{folder}` is not a folder: give another one with --keep-audit.")
        open_samples(folder, fingerprint, num_neurons)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._buffer = ShardBuffer(num_layers)
        self._split_of: dict[str, str] = {}  # of the requests in the last step
        self._num_requests = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kept-audit")
        self._writing: Future[None] | None = None
        self._is_broken = False

    def __call__(self, request_ids: Sequence[str], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take one step's tokens: each one's request, and (x_ND, magnitude_NF) of all layers."""
        if self._is_broken:
            return
        if not all(float(x_ND.abs().max()) <= FP16_MAX for x_ND, _ in layers):
            log.warning("audit samples beyond fp16 were left out")
            return
        self._split_of = {
            name: self._split_of.get(name) or self._next_split()
            for name in dict.fromkeys(request_ids)
        }
        for layer, (x_ND, magnitude_NF) in enumerate(layers):
            # the audit sees the vector behind the norm, not what the norm divided by
            unknown_N = torch.full((len(x_ND),), torch.nan)
            self._buffer.add_layer(layer, x_ND, unknown_N, magnitude_NF)
        for name in request_ids:
            self._buffer.add_tokens(self._split_of[name], 1)
        if self._buffer.num_bytes >= self._shard_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is left and wait for it."""
        if self._buffer.split and not self._is_broken:
            self._flush()
        self._writer.shutdown(wait=True)

    def _next_split(self) -> str:
        self._num_requests += 1
        return SPLIT_CYCLE[(self._num_requests - 1) % len(SPLIT_CYCLE)]

    def _flush(self) -> None:
        if self._writing is not None:
            self._writing.result()  # a disk slower than the audit slows the audit
        full, self._buffer = self._buffer, ShardBuffer(self._num_layers)
        if not self._is_broken:  # that write may have failed
            self._writing = self._writer.submit(self._write, full)

    def _write(self, buffer: ShardBuffer) -> None:
        path = self._folder / f"shard-{time.time_ns():020d}-{os.getpid()}.safetensors"
        facts: dict[str, Any] = {
            "by": "audit",
            "fingerprint": self._fingerprint,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokens": len(buffer.split),
        }
        size = buffer.num_bytes + HEADER_BYTES_PER_LAYER * (self._num_layers + 4)
        try:
            self._make_room(size)
            buffer.write(path, facts, is_private=True)
        except OSError as error:
            # Serving goes on; samples are worth less than answers.
            self._is_broken = True
            log.warning("audit samples are no longer kept: %s", error)

    def _make_room(self, size: int) -> None:
        """Drop the oldest shards until `size` more bytes fit."""
        shards = sorted(self._folder.glob("shard-*.safetensors"))
        sizes = [shard.stat().st_size for shard in shards]
        for shard, freed in zip(shards, sizes, strict=True):
            if sum(sizes) + size <= self._max_bytes:
                return
            shard.unlink(missing_ok=True)
            sizes = sizes[1:]
            log.info("dropped the oldest audit samples: %s, %d bytes", shard.name, freed)


def open_samples(folder: Path, fingerprint: str, num_neurons: int) -> Recording:
    """The samples in `folder`, none if it is empty. Raises BadData if they are not this model's."""
    recording = Recording(folder, num_neurons)
    try:
        facts = recording.facts()
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise BadData(
            f"`{folder}` holds a shard that cannot be read ({error}); remove it, or give another "
            "folder."
        ) from error
    for shard, fact in zip(recording.shards, facts, strict=True):
        found = fact.get("fingerprint")
        if found != fingerprint:
            whose = f"of the model {found}" if found else "of another kind"
            raise BadData(
                f"`{shard}` holds samples {whose}, this model is {fingerprint}. Give the folder "
                "that `hotneuron serve --keep-audit` wrote for this model, or an empty one to "
                "keep new samples in."
            )
    return recording
