"""The predictor as an object: what it computes, its files, and the one definition of recall.

Knows torch and numpy. Knows nothing of the runtime that serves it or of the trainer that makes it.
"""

from predictor.base import Predictor
from predictor.checkpoint import (
    PredictorCorrupted,
    PredictorMismatch,
    PredictorSet,
    load_predictors,
    save_predictors,
)
from predictor.fingerprint import fingerprint
from predictor.metrics import RecallMeter
from predictor.mlp import MlpPredictor
from predictor.profile import ActivationProfile

__all__ = [
    "ActivationProfile",
    "MlpPredictor",
    "Predictor",
    "PredictorCorrupted",
    "PredictorMismatch",
    "PredictorSet",
    "RecallMeter",
    "fingerprint",
    "load_predictors",
    "save_predictors",
]
