"""Sizes as people write and read them."""

import re

import typer

UNITS = {"": 1, "b": 1}
UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
UNITS |= {letter: 1024**power for power, letter in enumerate("kmgt", start=1)}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """'4GiB', '500 MB', '0' -> bytes."""
    match = SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in UNITS:
        raise typer.BadParameter(f"{text!r} is no size: write for example 4GiB, 512MiB or 0")
    return int(float(match[1]) * UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
