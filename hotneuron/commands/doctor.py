"""`hotneuron doctor`: is everything here that serving needs, and what to do if not."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .. import options
from ..units import format_bytes

MIN_FREE_DISK = 1 << 30
MIN_FREE_MEMORY = 1 << 30
MARKS = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}

Finding = dict[str, Any]


def doctor(as_json: options.JsonOption = False) -> None:
    """Check this installation; exit status 1 if something must be fixed. Uses no network."""
    findings = [check() for check in CHECKS]
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for finding in findings:
            console.print(f"{MARKS[finding['status']]} {finding['name']:<12}", end=" ")
            console.print(finding["detail"], markup=False, soft_wrap=True)
            if finding["fix"]:
                console.print(f"     {'':<12} fix: {finding['fix']}", markup=False, soft_wrap=True)
    if any(finding["status"] == "fail" for finding in findings):
        raise typer.Exit(1)


def found(name: str, status: str, detail: str, fix: str | None = None) -> Finding:
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def check_python() -> Finding:
    return found("python", "ok", f"{sys.version.split()[0]} in {sys.prefix}")


def check_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return found("torch", "fail", str(error), "run `make setup`")
    return found("torch", "ok", torch.__version__)


def check_kernels() -> Finding:
    try:
        from runtime.kernels import cpu
    except ImportError as error:
        return found("kernels", "fail", str(error), "build them with `make setup`")
    if cpu.isa() == "generic":
        return found("kernels", "warn", "C++, generic: this CPU has neither AVX2 nor AVX-512")
    return found("kernels", "ok", f"C++, {cpu.isa()}")


def check_threads() -> Finding:
    from runtime.config import usable_cpus

    return found("threads", "ok", f"{usable_cpus()} usable of {os.cpu_count()} logical CPUs")


def check_memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        free = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return found("memory", "warn", "free memory is unknown on this system")
    if free < MIN_FREE_MEMORY:
        return found("memory", "warn", f"{format_bytes(free)} free", "close other programs")
    return found("memory", "ok", f"{format_bytes(free)} free")


def check_accelerator() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return found("accelerator", "fail", "unknown without torch", "run `make setup`")
    if torch.cuda.is_available():
        return found("accelerator", "ok", torch.cuda.get_device_name(0))
    if shutil.which("nvidia-smi"):
        return found(
            "accelerator",
            "warn",
            f"there is an NVIDIA driver, but torch {torch.__version__} does not see a CUDA device",
            "install a CUDA build: remove .venv, then `make setup` with HOTNEURON_TORCH set",
        )
    return found("accelerator", "ok", "none; everything runs on the CPU")


def check_cache() -> Finding:
    from model_store import cache_root

    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".doctor"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return found("cache", "fail", str(error), "set HOTNEURON_CACHE to a folder you can write")
    free = shutil.disk_usage(root).free
    detail = f"{root}, {format_bytes(free)} free"
    if free < MIN_FREE_DISK:
        return found("cache", "warn", detail, "free some space, or set HOTNEURON_CACHE")
    return found("cache", "ok", detail)


def check_default_model() -> Finding:
    from model_store import cache_root
    from model_store.adapter import adapter_files
    from model_store.default_model import PACKAGED
    from model_store.errors import ModelNotFound

    try:
        adapter_files(PACKAGED / "adapter")
    except ModelNotFound as error:
        return found(
            "default", "fail", str(error), "restore model_store/default from the repository"
        )
    if (cache_root() / "models" / "default" / "config.json").is_file():
        return found("default", "ok", "in the cache: works without a network")
    return found("default", "warn", "not in the cache yet", "`hotneuron pull default`")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_kernels,
    check_threads,
    check_memory,
    check_accelerator,
    check_cache,
    check_default_model,
)
