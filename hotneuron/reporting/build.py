"""Puts the report together: everything that is known of a model's sparsity, as one dict.

Figures are copied from what was measured, never derived from other runs; the two speed-ups are the
only quotients.
"""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import machine
from ..console import UserError
from . import measure, table
from .stored import Stored

if TYPE_CHECKING:
    from predictor import ActivationProfile

FORMAT_VERSION = 1
COVERED = 0.8  # the share of activations that hot neurons are usually asked to hold
STORED_SET = "held-out"
OTHER_SET = "texts of another kind"


def shown(name: str) -> str:
    """A model or file as others may read it: a path of this machine is not theirs."""
    path = Path(name)
    return path.name if path.is_absolute() else name


def build_report(
    folder: Path,
    model: str,
    stored: Stored,
    *,
    data: Sequence[Path] = (),
    max_tokens: int | None = None,
    dense: str | None = None,
    bench: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """The report on the model in `folder`, which the user calls `model`, with its `stored` files.

    Without `data`, the figures that `train-predictors` stored. {"table": one row per set of
    documents, "missing": {column: command}, "sets": [...], "speed", "quality", "kinds", "coverage",
    and what the figures rest on}; None where nothing was measured.
    """
    name = shown(model)
    if stored.report is None and not data:
        raise UserError(
            f"{folder} has no stored report: train predictors with `train-predictors {model}`, or "
            "give --data to measure those that are there"
        )
    command = _command(name, data, max_tokens, dense, bench, out)
    speed = measure.speed_of(folder, name) if bench else None  # first: on a machine still quiet
    if data:
        results = measure.recall_of(folder, stored.predictors, data, max_tokens)
        sets = [_set(kind, "measured now", command, result) for kind, result in results.items()]
    else:
        sets = _stored_sets(name, stored.report or {})
    quality = None
    if dense:
        of_sets = measure.quality_of(folder, dense, data, max_tokens)
        quality = {"dense": shown(dense), "command": command, "sets": of_sets}
    report = {
        "format": "hotneuron-report",
        "format_version": FORMAT_VERSION,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "model": _model(folder, name, stored),
        "predictors": _predictors(stored),
        "data": [_data_file(path) for path in data],
        "sets": sets,
        "speed": speed,
        "quality": quality,
        "kinds": stored.kinds["kinds"] if stored.kinds else None,
        "coverage": coverage(stored.profile) if stored.profile else None,
    }
    rows = table.rows_of(report)
    missing = table.missing_columns(rows, name)
    return {**report, "table": rows, "missing": missing}


def _stored_sets(model: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What train-predictors measured, and beside it texts of another kind, if it got any."""
    trained = f"train-predictors {model}"
    sets = [_set(STORED_SET, "stored", trained, report)]
    if other := report.get("other"):
        sets.append(_set(OTHER_SET, "stored", f"{trained} --held-out-other TEXTS", other))
    return sets


def _set(name: str, source: str, command: str, result: dict[str, Any] | None) -> dict[str, Any]:
    return {"name": name, "source": source, "command": command, "result": result}


def _command(
    model: str,
    data: Sequence[Path],
    max_tokens: int | None,
    dense: str | None,
    bench: bool,
    out: Path | None,
) -> str:
    words = ["hotneuron", "report", model]
    for path in data:
        words += ["--data", shown(str(path))]
    if max_tokens is not None:
        words += ["--max-tokens", str(max_tokens)]
    if dense:
        words += ["--dense", shown(dense)]
    if bench:
        words += ["--bench"]
    if out:
        words += ["--out", shown(str(out))]
    return shlex.join(words)


def _model(folder: Path, name: str, stored: Stored) -> dict[str, Any]:
    from predictor.thresholds import config_value
    from runtime import ModelConfig

    config = ModelConfig.from_folder(folder)
    return {
        "name": name,
        "fingerprint": stored.fingerprint,
        "num_layers": config.num_layers,
        "d_model": config.d_model,
        "num_neurons": config.num_neurons,
        "activation": config.activation_name,
        "threshold": config_value(config.thresholds),
    }


def _predictors(stored: Stored) -> dict[str, Any]:
    manifest = stored.predictors.manifest
    return {
        "kind": manifest["kind"],
        "bytes": stored.predictors.num_bytes,
        "ranks": manifest.get("ranks"),  # not every kind has one
        "made": manifest.get("made"),
    }


def _data_file(path: Path) -> dict[str, Any]:
    """What a folder holds may be anything, so only a file gets a checksum."""
    from predictor.files import sha256_file

    return {"name": shown(str(path)), "sha256": sha256_file(path) if path.is_file() else None}


def coverage(profile: "ActivationProfile") -> dict[str, Any]:
    """How few neurons do most of the firing: the smallest share of them, most frequent first, whose
    activations are COVERED of all; over all layers together, and within each."""

    def share(counts: Any) -> float | None:
        covered = covered_by_top(counts)
        if covered is None:
            return None
        return float((covered < COVERED).sum() + 1) / len(covered)

    counts_LF = profile.counts_LF.numpy()
    return {
        "tokens": profile.num_tokens,
        "share_of_activations": COVERED,
        "share_of_neurons": share(counts_LF.ravel()),
        "share_of_neurons_by_layer": [share(counts_F) for counts_F in counts_LF],
    }


def covered_by_top(counts: Any) -> Any:
    """Share of activations that the 1, 2, ... most frequent neurons cover; None if none fired."""
    import numpy as np

    running = np.cumsum(np.sort(counts)[::-1], dtype=np.float64)
    return running / running[-1] if running[-1] else None
