"""The predictors of a whole model on disk: manifest.json + predictors.safetensors.

The manifest carries the format version, the fingerprint of the model, the kind of predictors (one
for all layers, see predictor.kinds), the shapes, how they were made and the checksum of the tensor
file, so that a damaged file or predictors of another model are refused at load, in words that say
what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from predictor.base import Predictor
from predictor.files import PredictorCorrupted, sha256_file, write_json, write_safetensors
from predictor.fingerprint import fingerprint as model_fingerprint
from predictor.fingerprint import read_gate
from predictor.kinds import GATE_KINDS, KINDS, of_gate
from predictor.mlp import Int4MlpPredictor, MlpPredictor

FORMAT = "hotneuron-sparsity"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PREDICTORS_FILE = "predictors.safetensors"

__all__ = [
    "PredictorCorrupted",
    "PredictorMismatch",
    "PredictorSet",
    "load_predictors",
    "save_predictors",
]


class PredictorMismatch(ValueError):
    """The predictors were trained on another model than the one they are loaded for."""


@dataclass
class PredictorSet:
    """One predictor per layer, and the manifest: {"fingerprint": ..., "made": {...}, ...}."""

    layers: Sequence[Predictor]
    manifest: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Predictor]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> Predictor:
        return self.layers[layer]

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)


def save_predictors(folder: Path, predictors: PredictorSet) -> None:
    """Write both files; the manifest last, because its checksum vouches for the other."""
    folder = Path(folder)
    if not predictors.manifest.get("fingerprint"):
        raise ValueError("manifest['fingerprint'] must name the model (predictor.fingerprint).")
    first, kinds = predictors.layers[0], {layer.kind for layer in predictors.layers}
    if len(kinds) > 1:
        raise ValueError(f"all layers must have one kind of predictor, not {sorted(kinds)}.")
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(predictors.layers)
        for name, tensor in layer.tensors.items()
    }
    path = folder / PREDICTORS_FILE
    write_safetensors(path, tensors)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **predictors.manifest,
        "kind": first.kind,
        "num_layers": len(predictors.layers),
        "d_model": first.d_model,
        "num_neurons": first.num_neurons,
        **_ranks(predictors.layers),
        "thresholds": [layer.threshold for layer in predictors.layers],
        "files": {PREDICTORS_FILE: {"sha256": sha256_file(path), "bytes": path.stat().st_size}},
    }
    write_json(folder / MANIFEST_FILE, manifest)


def load_predictors(folder: Path, *, fingerprint: str | None) -> PredictorSet:
    """Read and check a sparsity folder. `fingerprint` None skips the check against a model.

    Kinds that hold nothing but the gate need no tensor file inside their model's folder: they are
    made of its weights.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise PredictorMismatch(
            f"the predictors in `{folder}` belong to another model: they were trained for "
            f"fingerprint {manifest['fingerprint']}, this model has {fingerprint}. "
            f"Train its own with `train-predictors {folder.parent}`, or serve without predictors "
            "(`--sparsity exact`)."
        )
    path = folder / PREDICTORS_FILE
    if not path.is_file():
        if manifest["kind"] in GATE_KINDS and (folder.parent / "config.json").is_file():
            return _from_gates(folder.parent, manifest)
        raise _corrupted(path, "the file is missing")
    if sha256_file(path) != manifest["files"][PREDICTORS_FILE]["sha256"]:
        raise _corrupted(path, "its checksum is not the one in manifest.json")
    try:
        tensors = load_file(path)
        layers = [
            _layer(manifest["kind"], tensors, index, threshold)
            for index, threshold in enumerate(manifest["thresholds"])
        ]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _corrupted(path, str(error)) from error
    shapes = {(layer.d_model, layer.num_neurons) for layer in layers}
    if len(layers) != manifest["num_layers"] or shapes != {
        (manifest["d_model"], manifest["num_neurons"])
    }:
        raise _corrupted(path, "its shapes are not those of manifest.json")
    return PredictorSet(layers, manifest)


def _from_gates(model_dir: Path, manifest: dict[str, Any]) -> PredictorSet:
    """Predictors that were left out of the sparsity folder, made again of the model beside it."""
    if (name := model_fingerprint(model_dir)) != manifest["fingerprint"]:
        raise PredictorMismatch(
            f"`{model_dir / 'sparsity'}` was calibrated for fingerprint {manifest['fingerprint']}, "
            f"this model has {name}. Make its own with `train-predictors {model_dir}`."
        )
    layers = [
        of_gate(manifest["kind"], read_gate(model_dir, layer), threshold)
        for layer, threshold in enumerate(manifest["thresholds"])
    ]
    return PredictorSet(layers, manifest)


def _ranks(layers: Sequence[Predictor]) -> dict[str, list[int]]:
    """For people who read the manifest; kinds that have no rank say nothing."""
    networks = (MlpPredictor, Int4MlpPredictor)
    ranks = [layer.rank for layer in layers if isinstance(layer, networks)]
    return {"ranks": ranks} if ranks else {}


def _layer(kind: str, tensors: dict[str, Tensor], index: int, threshold: float) -> Predictor:
    cls = KINDS[kind]
    parts: dict[str, Any] = {
        attribute: tensors[f"layers.{index}.{name}"] for name, attribute in cls.TENSORS.items()
    }
    return cls(**parts, kind=kind, threshold=float(threshold))


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _corrupted(path, "the file is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, expected {FORMAT!r}")
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format version is {manifest['format_version']}, this program reads "
                f"{FORMAT_VERSION}"
            )
        if not isinstance(manifest["fingerprint"], str):
            raise ValueError("fingerprint is not readable")
        if manifest["kind"] not in tuple(KINDS):
            raise ValueError(f"kind is {manifest['kind']!r}, this program knows {', '.join(KINDS)}")
        for key in ("thresholds", "num_layers", "d_model", "num_neurons"):
            manifest[key]
        manifest["files"][PREDICTORS_FILE]["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupted(path, f"{type(error).__name__}: {error}") from error
    return dict(manifest)


def _corrupted(path: Path, why: str) -> PredictorCorrupted:
    return PredictorCorrupted(
        f"`{path}` cannot be used: {why}. Make it anew with "
        f"`train-predictors {path.parent.parent}`, restore the file (the default model's come with "
        "`hotneuron pull default`), or serve without predictors (`--sparsity exact`)."
    )
