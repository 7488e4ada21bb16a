"""Quality against tokens: a run's curve.jsonl, the power law its KL follows, and the figure.

The law KL = c * tokens^-a is a straight line in logarithms and is fitted as one, on the points
after the recipe's warm-up. What it says of more tokens than were trained on is an extrapolation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor.files import replacing

CURVE_FILE = "curve.jsonl"
COLUMNS = ("tokens", "kl", "top1_agreement", "sparsity", "perplexity")
MIN_POINTS = 3  # two always lie on a line
FAR = 1e15  # tokens; further away is as good as never


@dataclass(frozen=True)
class Point:
    """A validation during training: KL in nats per token, shares, perplexity, after `tokens`."""

    tokens: int
    kl: float
    top1_agreement: float
    sparsity: float
    perplexity: float


@dataclass(frozen=True)
class PowerLaw:
    """KL = scale * tokens^-exponent, with the exponent's standard error and R^2 in logarithms."""

    scale: float
    exponent: float
    stderr: float
    r2: float
    points: int

    def kl(self, tokens: float) -> float:
        return self.scale * math.pow(tokens, -self.exponent)

    def tokens_for(self, kl: float) -> float | None:
        """Where the law reaches `kl`; None if it never does, or so late that nobody will see it."""
        if self.exponent <= 0:
            return None
        log_tokens = math.log(self.scale / kl) / self.exponent
        return math.exp(log_tokens) if log_tokens < math.log(FAR) else None


@dataclass(frozen=True)
class Curve:
    """A run's validations in order, and the tokens up to which it warmed up."""

    name: str
    points: tuple[Point, ...]
    warmup_tokens: float

    @property
    def fitted(self) -> tuple[Point, ...]:
        """The points that a law can be fitted to."""
        return tuple(p for p in self.points if p.tokens > self.warmup_tokens and p.kl > 0)


def read_curve(name: str, run: Path) -> Curve | None:
    """The curve of a run folder; None if the run has none. ValueError names a bad line."""
    file = run / CURVE_FILE
    if not file.is_file():
        return None
    points = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            points.append(Point(*(values[column] for column in COLUMNS)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: expected an object with {', '.join(COLUMNS)}; "
                "remove the line, or the file to leave the run out of the figure"
            ) from error
    recipe = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return Curve(name, tuple(points), recipe["warmup"] * recipe["total_tokens"])


def fit_power_law(points: Sequence[Point]) -> PowerLaw | None:
    """Least squares of log KL on log tokens; None where there are fewer than three points."""
    from scipy.stats import linregress

    if len({point.tokens for point in points}) < MIN_POINTS:
        return None
    line = linregress(
        [math.log(point.tokens) for point in points], [math.log(point.kl) for point in points]
    )
    return PowerLaw(
        scale=math.exp(line.intercept),
        exponent=-float(line.slope),
        stderr=float(line.stderr),
        r2=float(line.rvalue**2),
        points=len(points),
    )


def describe_curve(curve: Curve, target_kl: float) -> dict[str, Any]:
    """The last point, the law, and when it reaches `target_kl`, for the result file."""
    law = fit_power_law(curve.fitted)
    wanted = law.tokens_for(target_kl) if law else None
    last = curve.points[-1] if curve.points else None
    return {
        "name": curve.name,
        "points": len(curve.points),
        "last_tokens": last.tokens if last else None,
        "last_kl": last.kl if last else None,
        "law": {
            "scale": law.scale,
            "exponent": law.exponent,
            "exponent_stderr": law.stderr,
            "r2": law.r2,
            "points": law.points,
        }
        if law
        else None,
        "target_kl": target_kl,
        "tokens_for_target": wanted,
        "extrapolated": bool(wanted and last and wanted > last.tokens),
    }


def draw(curves: Sequence[Curve], stem: Path) -> list[Path]:
    """KL, top-1 agreement and sparsity against tokens as `stem`.png and .svg; the two files.

    Equal curves give an equal SVG.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panels = (
        ("kl", "KL to the dense model, nats per token"),
        ("top1_agreement", "top-1 agreement with the dense model"),
        ("sparsity", "sparsity"),
    )
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "hotneuron", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for axis, (field, title) in zip(axes, panels, strict=True):
            for i, curve in enumerate(curves):
                shown = [point for point in curve.points if point.tokens > 0]  # the axis is a log
                tokens = [point.tokens for point in shown]
                values = [getattr(point, field) for point in shown]
                axis.plot(tokens, values, "o-", ms=3, lw=1, color=f"C{i}", label=curve.name)
            axis.set(xscale="log", xlabel="training tokens", title=title)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(NullFormatter())
        for i, curve in enumerate(curves):
            if law := fit_power_law(curve.fitted):
                tokens = [point.tokens for point in curve.fitted]
                label = f"{curve.name}: tokens^{-law.exponent:.2f}"
                fit = [law.kl(count) for count in tokens]
                axes[0].plot(tokens, fit, "--", lw=1, color=f"C{i}", label=label)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[0].legend(fontsize="x-small")
        axes[1].legend(fontsize="x-small")
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            file = stem.with_suffix(suffix)
            with replacing(file) as part:
                figure.savefig(part, format=suffix[1:], dpi=150, metadata=metadata)
            written.append(file)
    return written
