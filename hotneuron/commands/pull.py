"""`hotneuron pull`: a model's folder, ready for use with no network."""

from typing import Annotated

import typer

from ..console import UserError
from ..options import MODEL_HELP


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help=MODEL_HELP)] = "default",
    dense: Annotated[
        bool, typer.Option("--dense", help="The original of `default`, before it was made sparse.")
    ] = False,
) -> None:
    """Download and prepare a model; the last line is its folder."""
    from model_store import DEFAULT_MODEL, resolve_model

    if dense and name != DEFAULT_MODEL:
        raise UserError(f"--dense is for `{DEFAULT_MODEL}`; {name!r} is used as it is")
    typer.echo(resolve_model(name, dense=dense))
