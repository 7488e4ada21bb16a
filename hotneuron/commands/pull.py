"""`hotneuron pull`: a model's folder, ready for use with no network."""

from typing import Annotated

import typer

from ..options import MODEL_HELP


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help=MODEL_HELP)] = "default",
    dense: Annotated[
        bool, typer.Option("--dense", help="The original of `default`, before it was made sparse.")
    ] = False,
) -> None:
    """Download and prepare a model; the last line is its folder."""
    from model_store import resolve_model

    typer.echo(resolve_model(name, dense=dense))
