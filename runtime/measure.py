"""What this machine takes: read speeds of weight rows on both sides, the link, the cost of a join.

Measured once per machine and model width, and kept in the user's cache folder: the planner's costs.
Each side walks over more bytes than its caches hold. Dimensions: D model width, F neurons.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .accelerator import Accelerator
from .kernels import cpu_backend
from .workload import MachineCosts

FORMAT_VERSION = 1
MIB = 1 << 20
HOST_BYTES = 640 * MIB  # more than the last-level cache of a large server
DEVICE_BYTES = 512 * MIB
LINK_BYTES = 128 * MIB
SHARES = (0.05, 0.15, 0.4)  # of a layer's neurons that are read, at random
SECONDS = 0.2  # of each measurement
LAYER_KERNELS = 24  # that a layer's attention and selection start


@dataclass(frozen=True)
class MachineRates:
    """Of one machine and one model width; bytes per second and seconds."""

    machine: str
    width: int
    hot_bytes_per_s: float
    host_bytes_per_s: float
    cold_bytes_per_s: tuple[float, ...]  # by SHARES
    link_bytes_per_s: float
    sync_s: float
    layer_s: float

    def costs(self, share: float) -> MachineCosts:
        """For a model of which this share of the neurons is active."""
        cold = float(np.interp(share, SHARES, self.cold_bytes_per_s))
        return MachineCosts(
            self.hot_bytes_per_s, cold, self.host_bytes_per_s, self.link_bytes_per_s, self.sync_s,
            self.layer_s, is_measured=True,
        )  # fmt: skip


def machine_rates(accelerator: Accelerator, width: int, *, again: bool = False) -> MachineRates:
    """Of this machine: from the cache folder, or measured now (some seconds) and put there."""
    machine = describe_machine(accelerator)
    path = _cache_file(machine, width)
    if not again and (kept := _read(path, machine, width)) is not None:
        return kept
    rates = measure(accelerator, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"version": FORMAT_VERSION, **asdict(rates)}, indent=2) + "\n")
    temporary.replace(path)
    return rates


def describe_machine(accelerator: Accelerator) -> str:
    """What the figures hold for: processor, threads and kernels, accelerator, versions."""
    cpu = cpu_backend()
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return f"{_cpu_name()}, {cpu.num_threads()} threads, {cpu.isa()}; {name}; {torch.__version__}"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cache_file(machine: str, width: int) -> Path:
    from model_store import cache_root  # late: measuring alone needs none of its libraries

    digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
    return cache_root() / "machine" / f"{digest}-{width}.json"


def _read(path: Path, machine: str, width: int) -> MachineRates | None:
    """What the file says of this machine; None if it is not there, or from another version."""
    try:
        kept = json.loads(path.read_text())
        if kept.pop("version") != FORMAT_VERSION:
            return None
        rates = MachineRates(**{**kept, "cold_bytes_per_s": tuple(kept["cold_bytes_per_s"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates if (rates.machine, rates.width) == (machine, width) else None


def measure(
    accelerator: Accelerator,
    width: int,
) -> MachineRates:
    """All figures, without looking at what is kept."""
    host_FD = _rows(HOST_BYTES, width)
    return MachineRates(
        machine=describe_machine(accelerator),
        width=width,
        hot_bytes_per_s=_device_rate(accelerator, width),
        host_bytes_per_s=_matrix_rate(host_FD),
        cold_bytes_per_s=tuple(_sparse_rate(host_FD, share) for share in SHARES),
        link_bytes_per_s=_link_rate(accelerator),
        sync_s=_sync_seconds(accelerator, width),
        layer_s=_layer_seconds(accelerator, width),
    )


def _rows(num_bytes: int, width: int) -> Tensor:
    """bf16 rows in huge pages; what they hold does not matter, so they are all alike."""
    from .kernels.cpu import HugePages

    num_rows = max(192, num_bytes // (2 * width) // 192 * 192)
    row_D = torch.randn(width, generator=torch.Generator().manual_seed(0)).bfloat16()
    return HugePages(2 * num_rows * width).copy(row_D.expand(num_rows, width))


def median_seconds(
    call: Callable[[], object], seconds: float = SECONDS, min_calls: int = 3
) -> float:
    """Of one call; the median is what a busy neighbour disturbs least."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < min_calls or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def _matrix_rate(rows_FD: Tensor) -> float:
    """Of whole matrices on the host."""
    from .kernels import cpu

    x_ND = torch.ones(1, rows_FD.shape[1])
    y_NF = torch.empty(1, len(rows_FD))
    return rows_FD.nbytes / median_seconds(lambda: cpu.linear(x_ND, rows_FD, y_NF))


def _sparse_rate(rows_FD: Tensor, share: float) -> float:
    """Of selected neurons on the host, all of which fire: three rows each."""
    from .kernels.cpu import CpuFfn

    F, D = len(rows_FD) // 3, rows_FD.shape[1]
    gate_FD = rows_FD[:F]
    up_FD, down_FD = rows_FD[F:].view(F, 2, D).unbind(1)  # as they are loaded
    ffn = CpuFfn(gate_FD, up_FD, down_FD, threshold=-float("inf"))
    x_ND, y_ND = torch.ones(1, D), torch.empty(1, D)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(1, F, generator=generator) < share for _ in range(4)]
    turns = count()
    taken = median_seconds(
        lambda: ffn.forward_selected(x_ND, masks[next(turns) % len(masks)], y_ND)
    )
    read = sum(float(mask.sum()) for mask in masks) / len(masks) * 3 * 2 * D
    return read / taken


def _device_rate(accelerator: Accelerator, width: int) -> float:
    device = accelerator.device
    num_rows = max(64, DEVICE_BYTES // (2 * width))
    rows_FD = torch.ones(num_rows, width, dtype=torch.bfloat16, device=device)
    x_ND = torch.ones(1, width, dtype=torch.bfloat16, device=device)

    def product() -> None:
        accelerator.start(lambda: torch.nn.functional.linear(x_ND, rows_FD)).result()
        _finish(device)

    return rows_FD.nbytes / median_seconds(product)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _link_rate(accelerator: Accelerator) -> float:
    source = accelerator.host_buffer(LINK_BYTES, dtype=torch.uint8).zero_()
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=accelerator.device)
    copies = accelerator.copy_stream()

    def copy() -> None:
        copies.copy(target, source)
        copies.wait()

    return LINK_BYTES / median_seconds(copy)


def _sync_seconds(accelerator: Accelerator, width: int) -> float:
    """A vector to the host and one back."""
    down = torch.zeros(2 * width, device=accelerator.device)  # the vector, and its mask in bytes
    host = accelerator.host_buffer(2 * width, dtype=torch.float32)
    up = accelerator.host_buffer(width, dtype=torch.float32)
    copies = accelerator.copy_stream()

    def there_and_back() -> None:
        copies.copy(host, down)
        copies.wait()
        up.to(accelerator.device, non_blocking=True)

    return median_seconds(there_and_back)


def _layer_seconds(accelerator: Accelerator, width: int) -> float:
    """As many small kernels as a layer starts, in the way that decode steps start them."""
    x_D = torch.zeros(width, device=accelerator.device)

    def kernels() -> Tensor:
        for _ in range(LAYER_KERNELS):
            x_D.add_(1.0)
        return x_D

    kernels()
    run: Callable[[], Any] = kernels
    if accelerator.can_record:
        run = accelerator.record(kernels).run

    def step() -> None:
        accelerator.start(run).result()
        _finish(accelerator.device)

    return median_seconds(step)
