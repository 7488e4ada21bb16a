"""Options that several commands share, each with its environment variable."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .units import parse_bytes


class Mode(StrEnum):
    """Which neurons are computed."""

    auto = "auto"
    dense = "dense"
    exact = "exact"
    predicted = "predicted"


class Dtype(StrEnum):
    """What is computed with where weights are not rounded further."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Weights(StrEnum):
    """What weights are kept in."""

    auto = "auto"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class Kernels(StrEnum):
    """Who computes on the CPU."""

    auto = "auto"
    cpu = "cpu"
    torch = "torch"


class OnGpuLoss(StrEnum):
    """What becomes of the server."""

    exit = "exit"
    cpu = "cpu"


MODEL_HELP = "`default`, a Hugging Face model folder, a .gguf file, or a Hub id."
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", envvar="HOTNEURON_MODEL", help=MODEL_HELP)
]
DeviceOption = Annotated[
    str, typer.Option(envvar="HOTNEURON_DEVICE", help="Accelerator: auto, cpu or cuda.")
]
SparsityOption = Annotated[
    Mode,
    typer.Option(
        envvar="HOTNEURON_SPARSITY",
        help="dense: all neurons. exact: all gates, then only what fires (same answers). "
        "predicted: predictors choose first. auto: predicted if the model has predictors that "
        "spare reading.",
    ),
]
VramOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        envvar="HOTNEURON_VRAM_BUDGET",
        help="Accelerator memory in all, such as 4GiB; hot neurons fill what the rest leaves.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, envvar="HOTNEURON_THREADS", help="CPU threads; all usable ones if unset."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(envvar="HOTNEURON_DTYPE", help="Type of cached keys, and of weights unless set."),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        envvar="HOTNEURON_WEIGHTS",
        help="bf16, or rounded at load to int8 or int4 in groups of 32 (C++ kernels on the host). "
        "auto: as --dtype says.",
    ),
]
KernelsOption = Annotated[
    Kernels, typer.Option(envvar="HOTNEURON_KERNELS", help="CPU kernels: C++ (cpu) or torch.")
]
MaxContextOption = Annotated[
    int | None,
    typer.Option(min=8, envvar="HOTNEURON_MAX_CONTEXT", help="Most tokens of prompt and answer."),
]
OnGpuLossOption = Annotated[
    OnGpuLoss,
    typer.Option(
        envvar="HOTNEURON_ON_GPU_LOSS",
        help="If the accelerator is lost or runs out of memory while serving: exit (status 1), or "
        "load the model on the CPU and go on. Requests under way get an error.",
    ),
]
PlacementOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        envvar="HOTNEURON_PLACEMENT",
        help="A placement saved by `hotneuron place --out`; planned anew if not given.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
