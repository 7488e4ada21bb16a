"""All commands of `hotneuron prosparse`: importing a module registers its own on the app."""

from __future__ import annotations

from . import analysis_cli, drills_cli, table_cli, train_cli
from .cli import app

__all__ = ["analysis_cli", "app", "drills_cli", "table_cli", "train_cli"]
