"""Training by several processes: who takes part, sharding of the student, means over all of them.

`accelerate launch` (or torchrun) starts the processes; each computes its own rows, and the layers
of the student are sharded by PyTorch's FSDP2, frozen matrices included. We call `fully_shard`
ourselves, because `accelerate` shards on accelerators only and this way two CPU processes run what
eight GPUs run. The teacher is not sharded: every process holds the dense model once.
One process is the plain case of the same calls.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    count: int = 1
    index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_launcher(cls, device: str) -> Processes:
        """Join the others if a launcher started us; `device` is cpu, cuda ..."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=torch.device(device))
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return cls(state.num_processes, state.process_index, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this one prints and writes files."""
        return self.index == 0

    def shard(self, student: nn.Module, layers: nn.ModuleList) -> None:
        """Spread the student's parameters over all processes, a layer at a time."""
        if self.count == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, the same tensor on each."""
        if self.count == 1:
            return values
        total = values.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: does any process raise it? All get the same answer at the same step."""
        return [share > 0 for share in self.mean(torch.tensor(flags, dtype=torch.float32,
                device=self.device)).tolist()]  # fmt: skip

    def leave(self) -> None:
        """The last thing that one of several processes does: waits for the others and ends.

        It ends at once, without what an interpreter tears down: torch's threads may outlive the
        process group, and then abort a process that has done all its work.
        """
        if self.count > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (every process has to ask); others as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
