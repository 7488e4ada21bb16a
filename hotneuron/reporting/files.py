"""Writes the report's folder: report.json, report.md and each plot as PNG and SVG.

The plots of two runs on the same figures are the same bytes, so that results can be committed.
"""

import os
from pathlib import Path
from typing import Any

from ..console import UserError
from .markdown import report_markdown
from .stored import Stored

PNG_DPI = 160
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": PNG_DPI, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
}


def prepare_folder(out: Path) -> None:
    """Make the folder before anything is measured for it; UserError if nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} is no folder and cannot become one: {error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written to: give a folder of yours")


def write_report(out: Path, report: dict[str, Any], stored: Stored) -> None:
    """Write all files; report.json names the plots, and why one is not there."""
    from predictor.files import replacing, write_json

    figures = draw_figures(out, report, stored)
    report = {**report, "figures": figures}
    write_json(out / "report.json", report)
    with replacing(out / "report.md") as partial:
        partial.write_text(report_markdown(report), encoding="utf-8")


def draw_figures(out: Path, report: dict[str, Any], stored: Stored) -> list[dict[str, Any]]:
    """Draw what can be drawn; {"name", "title", "note", "source", "command", "files"} of each.

    `files` is empty where the source is absent; `command` then writes it.
    """
    import matplotlib

    from predictor.files import replacing

    from .plots import PLOTS, STYLE

    figures = []
    for plot in PLOTS:
        files = []
        if plot.is_possible(report, stored):
            with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
                figure = plot.draw(report, stored)
                for kind, settings in FORMATS.items():
                    with replacing(out / f"{plot.name}.{kind}") as partial:
                        figure.savefig(partial, format=kind, **settings)
                    files.append(f"{plot.name}.{kind}")
        figures.append(
            {
                "name": plot.name,
                "title": plot.title,
                "note": plot.note,
                "source": plot.source,
                "command": plot.command.format(
                    model=report["model"]["name"], sets=report["sets"][0]["command"]
                ),
                "files": files,
            }
        )
    return figures
