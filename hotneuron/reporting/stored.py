"""What lies in a model's sparsity folder, read and checked against the model's weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import UserError

if TYPE_CHECKING:
    from predictor import ActivationProfile, PredictorSet


@dataclass(frozen=True)
class Stored:
    """The files that `train-predictors` wrote; None where one is absent."""

    fingerprint: str
    predictors: "PredictorSet"
    report: dict[str, Any] | None
    curves: dict[str, Any] | None
    kinds: dict[str, Any] | None
    profile: "ActivationProfile | None"


def read_stored(folder: Path, model: str) -> Stored:
    """All files of `folder`/sparsity. `model` is how the user calls the model.

    Raises UserError, PredictorCorrupted or PredictorMismatch for files that are missing, damaged or
    another model's; the message names the command that makes them.
    """
    from predictor import ActivationProfile, fingerprint, load_predictors
    from predictor.profile import PROFILE_FILE
    from training_predictors.pipeline import CURVES_FILE, KINDS_FILE, REPORT_FILE

    sparsity = folder / "sparsity"
    if not sparsity.is_dir():
        raise UserError(
            f"{folder} has no predictors and no stored report: train them with "
            f"`train-predictors {model}`"
        )
    name = fingerprint(folder)
    train = f"train-predictors {model}"
    profile = sparsity / PROFILE_FILE
    return Stored(
        name,
        load_predictors(sparsity, fingerprint=name),
        _read_json(sparsity / REPORT_FILE, name, train),
        _read_json(sparsity / CURVES_FILE, name, train),
        _read_json(sparsity / KINDS_FILE, name, f"{train} --compare"),
        ActivationProfile.load(profile) if profile.is_file() else None,
    )


def _read_json(path: Path, fingerprint: str, command: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = value["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): make it anew with `{command}`"
        ) from error
    if found != fingerprint:
        raise UserError(
            f"{path} was measured on another model (fingerprint {found}, this one has "
            f"{fingerprint}): make it anew with `{command}`"
        )
    return value
