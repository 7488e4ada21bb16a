"""Timing on a GPU, and results that are kept as they come: what bench_gpu.py builds on.

Times are those of the device: CUDA events around replays of a graph. The weights of many layers
take turns, so that the L2 cache never holds what is read next.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hotneuron import machine

DEVICE = torch.device("cuda")
GIB = 1 << 30
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


class Results:
    """A result file that is whole after every row: the machine may be taken away at any time."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._content: dict[str, Any] = {**machine.facts(), "settings": settings, "results": []}

    def add(self, **row: Any) -> None:
        self._content["results"].append(row)
        self._path.write_text(json.dumps(self._content, indent=2) + "\n")


def capture(ops: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All of them one after the other as one graph; each runs once before, to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for op in ops:
            op()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for op in ops:
            op()
    return graph


def chain_us(ops: Sequence[Callable[[], object]], repeats: int) -> dict[str, float]:
    """Microseconds of one op, the gap to the next included: median, least and most of `repeats`
    replays of all of them."""
    graph = capture(ops)
    for _ in range(2):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(repeats)]  # fmt: skip
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) / len(ops) for start, end in events]
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}


def alone_us(op: Callable[[], object], repeats: int) -> float:
    """Microseconds of one op by itself, launched after the L2 cache was overwritten: median."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    op()
    events = []
    for i in range(repeats):
        flush.fill_(i % 7)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        op()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in events)


def copy_bytes_per_s(repeats: int) -> float:
    """A large copy within the device: bytes read plus bytes written."""
    source = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    us = chain_us([lambda: target.copy_(source)], repeats)["us"]
    return 2 * len(source) / (1e-6 * us)


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())
