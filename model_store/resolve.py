"""What a model's name means: every command turns the same name into the same folder."""

import re
from pathlib import Path

from .cache import cache_root
from .default_model import materialize_default, materialize_dense, materialize_gguf
from .errors import ModelNotFound
from .folders import check_model_folder
from .hub import fetch_from_hub
from .progress import Progress

DEFAULT_MODEL = "default"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(
    name: str, *, dense: bool = False, cache_dir: Path | None = None, progress: bool = True
) -> Path:
    """The Hugging Face folder of `default`, a local folder, a GGUF file or a Hub id.

    `dense` asks for the original of `default`, before it was made sparse; any other model is used
    as it is. Progress goes to stderr.
    """
    news = Progress(progress)
    root = cache_root() if cache_dir is None else cache_dir
    if name == DEFAULT_MODEL:
        return materialize_dense(root, news) if dense else materialize_default(root, news)
    path = Path(name).expanduser()
    if path.is_dir():
        return check_model_folder(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"there is no GGUF file {path}")
        return materialize_gguf(path, root, news)
    if path.exists():
        raise ModelNotFound(f"{path} is neither a model folder nor a .gguf file")
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return check_model_folder(fetch_from_hub(name, news))
    raise ModelNotFound(
        f"unknown model {name!r}: give `{DEFAULT_MODEL}`, a model folder, a .gguf file, "
        "or a Hub id such as owner/name"
    )
