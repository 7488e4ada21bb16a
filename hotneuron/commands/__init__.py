"""One file per subcommand."""

__all__: list[str] = []
