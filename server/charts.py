"""Shapes of the page's drawings: numbers in, SVG path data out. Colours and words are elsewhere.

Drawings are stretched to whatever width the page has: one unit is one column (a layer, a second),
and a height of 100 is the whole axis. Lines and dots keep their thickness (`vector-effect`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

HEAT_LEVELS = 9
Value = float | None


def bars(values: Sequence[Value], width: float = 0.72) -> str:
    """Columns of shares from the axis up."""
    side = (1 - width) / 2
    return "".join(
        f"M{_n(i + side)} 100h{_n(width)}v{_n(-100 * value)}h{_n(-width)}z"
        for i, value in enumerate(values)
        if value is not None
    )


def dots(values: Sequence[Value], low: float, high: float) -> str:
    """A point in the middle of each column; the stroke's round ends make it a dot."""
    return "".join(
        f"M{_n(i + 0.5)} {_y(value, low, high)}h0"
        for i, value in enumerate(values)
        if value is not None
    )


def whiskers(bounds: Sequence[Sequence[float] | None], low: float, high: float) -> str:
    """From the lower to the upper bound of each column."""
    return "".join(
        f"M{_n(i + 0.5)} {_y(pair[0], low, high)}V{_y(pair[1], low, high)}"
        for i, pair in enumerate(bounds)
        if pair is not None
    )


def line(values: Sequence[Value], low: float, high: float) -> str:
    """Through the columns' middles; broken where a value is missing."""
    parts, pen = [], "M"
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
        else:
            parts.append(f"{pen}{_n(i + 0.5)} {_y(value, low, high)}")
            pen = "L"
    return "".join(parts)


def area(values: Sequence[Value], low: float, high: float) -> str:
    """Below `line`, with missing values as none at all."""
    if not values:
        return ""
    filled = [low if value is None else value for value in values]
    return f"M0.5 100{line(filled, low, high).replace('M', 'L')}L{_n(len(values) - 0.5)} 100z"


def level(value: float, low: float, high: float, width: int) -> str:
    """A straight line across."""
    return f"M0 {_y(value, low, high)}H{width}"


def top(values: Sequence[Value]) -> float:
    """The largest value there is."""
    return max((value for value in values if value is not None), default=0.0)


def heat(share_LG: Sequence[Sequence[float]]) -> list[tuple[int, str]]:
    """(level, path of all its cells), cell l, g at x = g, y = l; level 0, nearly never, is left
    out. Levels are steps of the largest share; neighbours of one level are one rectangle."""
    top = heat_top(share_LG)
    paths: dict[int, list[str]] = {level: [] for level in range(1, HEAT_LEVELS + 1)}
    for y, row in enumerate(share_LG):
        levels = [round(HEAT_LEVELS * share / top) for share in row]
        start = 0
        for x in range(1, len(levels) + 1):
            if x == len(levels) or levels[x] != levels[start]:
                if levels[start]:
                    paths[levels[start]].append(f"M{start} {y}h{x - start}v1h{start - x}z")
                start = x
    return [(level, "".join(parts)) for level, parts in paths.items() if parts]


def heat_top(share_LG: Sequence[Sequence[float]]) -> float:
    """What the highest level stands for."""
    return max((share for row in share_LG for share in row), default=0.0) or 1.0


def hot_edge(num_hot_L: Sequence[int], num_neurons: int, num_groups: int) -> str:
    """The line between hot neurons, which stand first, and cold ones, over a heat map."""
    scale = num_groups / num_neurons
    return "".join(f"M{_n(hot * scale)} {y}v1" for y, hot in enumerate(num_hot_L))


def stack(parts: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, start, share) of each part of a bar of width 100."""
    total, at, rows = sum(parts.values()), 0.0, []
    for name, value in parts.items():
        share = 100 * value / total if total else 0.0
        rows.append((name, round(at, 3), round(share, 3)))
        at += share
    return rows


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _y(value: float, low: float, high: float) -> str:
    inside = min(max(value, low), high)
    return _n(100 - 100 * (inside - low) / (high - low))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
