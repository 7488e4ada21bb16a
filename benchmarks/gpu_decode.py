"""Whole decode steps on a GPU: the layers of a model with random weights, built in its memory.

What bench_gpu.py calls `decode`. The layers are the runtime's own: attention, FFNs and graphs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_layers import EPS, Layer, ffns_of, make_layers, model_config
from gpu_timing import DEVICE, Results, relative_error, say
from torch import Tensor

from runtime.config import Mode
from runtime.cuda_ffn import CudaSparseFFN
from runtime.decode_graphs import DecodeGraphs
from runtime.kernels.cuda import DownBuffers, Rows, linear, rms_norm
from runtime.kernels.cuda_decode import AttentionBuffers, CudaAttention, KvBatch
from runtime.kv_cache import SequenceCache, new_cache

AddFfn = Callable[[int, Tensor], None]  # layer, residual stream: added in place


class Decoder:
    """Embedding, layers and head; the FFNs are given."""

    def __init__(self, layers: list[Layer], args: argparse.Namespace) -> None:
        self.layers = layers
        self.config = config = model_config(args, [layer.threshold for layer in layers])
        D, device = args.d_model, DEVICE
        generator = torch.Generator(device).manual_seed(1)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, device=device)
            return (values * gain / columns**0.5).bfloat16()

        capacity = args.context + 256
        angle_SK = torch.outer(
            torch.arange(capacity, device=device).float(),
            10000.0 ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim),
        )
        heads = config.num_heads, config.num_kv_heads
        buffers = AttentionBuffers(*heads, config.head_dim, device)
        self.norm_D = torch.ones(D, device=device)
        self.embed_VD = matrix(args.vocab, D, D**0.5)
        self.head = Rows.of(matrix(args.vocab, D), device)
        self.attentions = [
            CudaAttention(
                l, self.norm_D, matrix(3 * D, D), matrix(D, D, 0.5), angle_SK.cos(),
                angle_SK.sin(), num_heads=heads[0], num_kv_heads=heads[1], eps=EPS,
                dtype=torch.bfloat16, buffers=buffers,
            )
            for l in range(len(layers))
        ]  # fmt: skip
        self.caches = [self._filled(capacity, args.context) for _ in range(max(args.batch))]

    def _filled(self, capacity: int, length: int) -> SequenceCache:
        cache = new_cache(self.config, capacity, torch.bfloat16, DEVICE)
        cache.pool_BL2GTK.normal_()
        cache.length = length
        return cache

    def step(self, ids_N: Tensor, kv: KvBatch, add_ffn: AddFfn) -> Tensor:
        x_ND = self.embed_VD[ids_N].float()
        for l, attention in enumerate(self.attentions):
            attention.forward(x_ND, kv)
            add_ffn(l, x_ND)
        return linear(rms_norm(x_ND, self.norm_D, EPS), self.head)

    def true_logits(self, ids: list[int], caches: list[SequenceCache]) -> Tensor:
        """With FFNs in fp32."""

        def add_ffn(l: int, x_ND: Tensor) -> None:
            x_ND += self.layers[l].true_ffn(rms_norm(x_ND, self.norm_D, EPS))

        pools, tables = [c.pool_BL2GTK for c in caches], [c.table for c in caches]
        kv = KvBatch.of(pools, tables, [cache.length for cache in caches])
        return self.step(torch.tensor(ids, device=DEVICE), kv, add_ffn)

    def graphs(self, ffns: list[CudaSparseFFN]) -> DecodeGraphs:
        def step(ids_N: Tensor, kv: KvBatch, mode: Mode) -> Tensor:
            return self.step(
                ids_N, kv, lambda l, x_ND: ffns[l].add_to(x_ND, self.norm_D, EPS, mode)
            )

        spare = new_cache(self.config, 1, torch.bfloat16, DEVICE)
        return DecodeGraphs(step, spare, DEVICE)

    @property
    def num_bytes(self) -> int:
        """Of attention and head: what every path reads."""
        L, D = self.config.num_layers, self.config.d_model
        return 2 * D * (4 * D * L + self.config.vocab_size)


def ids_of(num_tokens: int) -> list[int]:
    return list(range(7, 7 + num_tokens))


def measure_decode_steps(args: argparse.Namespace, results: Results) -> None:
    layers = make_layers(args, args.layers)
    say("making attention and head")
    decoder = Decoder(layers, args)
    buffers = DownBuffers.of(args.num_neurons, args.d_model, DEVICE)
    by_path = ffns_of(layers, args, buffers)
    truth = {N: decoder.true_logits(ids_of(N), decoder.caches[:N]) for N in args.batch}
    dense: dict[int, dict[str, float]] = {}
    for path, (mode, ffns) in by_path.items():
        graphs = decoder.graphs(ffns)
        for N in args.batch:
            ids, caches = ids_of(N), decoder.caches[:N]
            error = relative_error(graphs.decode(ids, caches, mode), truth[N])
            if path == "exact" and not error <= dense[N]["logits_error"]:
                raise SystemExit(f"exact is further off than bf16 products: {error:.3g}; not timed")
            row: dict[str, Any] = {"logits_error": error}
            row |= _timed(graphs, ids, caches, mode, 4 * args.repeats)
            if path == "dense":
                dense[N] = row
            row["times_dense"] = row["tokens_per_s"] / dense[N]["tokens_per_s"]
            results.add(measurement="decode", path=path, batch=N, layers=args.layers,
                        context=args.context, attention_and_head_bytes=decoder.num_bytes,
                        ffn_bytes=_ffn_bytes(ffns, mode), **row)  # fmt: skip
            say(f"decode {path:21} batch {N:2}: {row['tokens_per_s']:8.1f} tokens/s, "
                f"{row['times_dense']:.2f} x dense; step {row['step_ms']:.3f} ms, of the GPU "
                f"{row['gpu_ms']:.3f} ms; logits {error:.1e} off")  # fmt: skip


def _timed(
    graphs: DecodeGraphs, ids: list[int], caches: list[SequenceCache], mode: Mode, steps: int
) -> dict[str, float]:
    """Greedy steps as an engine takes them: each waits for its tokens. Lengths are put back."""
    lengths = [cache.length for cache in caches]
    seconds = []
    for i in range(steps + 3):
        start = time.perf_counter()
        ids = graphs.decode(ids, caches, mode).argmax(-1).tolist()
        seconds.append(time.perf_counter() - start)
        for cache, length in zip(caches, lengths, strict=True):
            cache.length = length + i % 100
    for cache, length in zip(caches, lengths, strict=True):
        cache.length = length
    step_s = statistics.median(seconds[3:])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = graphs.captured(len(ids), mode).graph
    start.record()
    for _ in range(steps):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return {"tokens_per_s": len(ids) / step_s, "step_ms": 1e3 * step_s,
            "step_ms_max": 1e3 * max(seconds[3:]),
            "gpu_ms": start.elapsed_time(end) / steps}  # fmt: skip


def _ffn_bytes(ffns: list[CudaSparseFFN], mode: Mode) -> int:
    """If all neurons were active, with what a predictor reads."""
    matrices = sum(3 * ffn.kernel.gate.data.nbytes for ffn in ffns)
    selectors = [ffn.kernel.selector for ffn in ffns if mode == "predicted"]
    return matrices + sum(s.predictor.num_bytes for s in selectors if s is not None)
