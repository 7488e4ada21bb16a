"""`hotneuron report`: recall and sparsity on texts, measured offline."""

from pathlib import Path
from typing import Annotated

import typer

from .. import options


def report(
    model: options.ModelArgument = "default",
    data: Annotated[
        Path | None, typer.Option(help="Chats (JSONL) or texts to measure on.", exists=True)
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure what the predictors find and miss, layer by layer, with the dashboard's metrics."""
    raise NotImplementedError
