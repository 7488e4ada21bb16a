"""Where a setting comes from: flag, then environment, then config file, then default.

Typer does the first two and the last; the config file is its `default_map`. Owns the `--config`
option and the list of resolved values printed at start.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

SECRETS = {"api_key"}
SOURCES = {
    "COMMANDLINE": "flag",
    "ENVIRONMENT": "environment",
    "DEFAULT_MAP": "config file",
    "DEFAULT": "default",
}


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    names = [name for param in ctx.command.params if (name := param.name) and name != "config"]
    settings: dict[str, Any] = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise typer.BadParameter(
            f"{path} sets {', '.join(unknown)}; known settings: {', '.join(sorted(names))}"
        )
    ctx.default_map = {**(ctx.default_map or {}), **settings}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="HOTNEURON_CONFIG",
        is_eager=True,
        callback=_read_config,
        help="TOML file with settings, named like the flags (max_batch = 8).",
    ),
]


def describe_settings(ctx: typer.Context) -> list[tuple[str, str, str]]:
    """(name, value, source) of every setting of this command; secrets are counted, not shown."""
    rows = []
    for param in ctx.command.params:
        name = param.name
        if name is None or name not in ctx.params or name == "config":
            continue
        value = ctx.params[name]
        source = ctx.get_parameter_source(name)
        shown = "-" if value is None else str(value)
        if name in SECRETS:
            shown = f"{len(value or ())} given"
        rows.append((name, shown, SOURCES.get(source.name, "-") if source else "-"))
    return rows
