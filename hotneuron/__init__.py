"""The command line: the one place that puts the parts together. Nothing imports it."""

__all__: list[str] = []
