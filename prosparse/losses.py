"""What the student is trained to make small, next to L1 (schedule.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distillation_loss(student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats over P positions."""
    teacher = teacher_PV.float().log_softmax(-1)
    student = student_PV.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def stream_error(stream: Sequence[Tensor], wanted: Sequence[Tensor], every: int) -> Tensor:
    """Relative squared error of the residual stream at every `every`-th layer, the last included.

    Mean over positions and layers, each [B, S, D]; 0 where nothing is `wanted`.
    """
    errors = []
    for x_BSD, wanted_BSD in list(zip(stream, wanted, strict=False))[::-1][::every]:
        wanted_BSD = wanted_BSD.float()
        miss_BS = (x_BSD.float() - wanted_BSD).square().sum(-1)
        errors.append((miss_BS / wanted_BSD.square().sum(-1)).mean())
    return torch.stack(errors).mean() if errors else stream[0].new_zeros((), dtype=torch.float32)
