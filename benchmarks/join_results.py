"""Several result files of one session on one machine as one: what gpu_session.sh leaves.

    python benchmarks/join_results.py session.json operators.json decode.json

What all have in common stands once; folders of this machine are left out. Files that are not there
are passed over: their part was not run, or left nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

COMMON = ("commit", "versions")
LOAD = "load_average_at_start"


def join(paths: list[Path]) -> dict[str, Any]:
    """ValueError: they are not of the same commit, versions and machine."""
    joined: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for path in paths:
        content = json.loads(path.read_text())
        hardware = content.pop("hardware")
        load = hardware.pop(LOAD)
        head = {name: content.pop(name) for name in COMMON} | {"hardware": hardware}
        if joined not in ({}, head):
            raise ValueError(f"{path} is of another commit or machine")
        joined = head
        for name in ("out", "command"):  # the other settings say the same
            content["settings"].pop(name, None)
        parts[path.stem] = {"measured_at": content.pop("measured_at"), LOAD: load, **content}
    return {**joined, "parts": parts}


def main() -> None:
    out, *paths = map(Path, sys.argv[1:])
    present = [path for path in paths if path.is_file()]
    if present:
        out.write_text(json.dumps(join(present), indent=1) + "\n")


if __name__ == "__main__":
    main()
