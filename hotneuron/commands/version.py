"""`hotneuron version`."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import typer


def version() -> None:
    """Print the versions of hotneuron, Python and what it computes with."""
    typer.echo(f"python {platform.python_version()}")
    for name in ("hotneuron", "torch", "transformers"):
        try:
            typer.echo(f"{name} {version_of(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
