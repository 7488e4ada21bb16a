"""All commands of `hotneuron prosparse`: importing a module registers its own on the app."""

from __future__ import annotations

from . import table_cli, train_cli
from .cli import app

__all__ = ["app", "table_cli", "train_cli"]
