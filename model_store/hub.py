"""Models of the Hugging Face Hub, through huggingface_hub's own cache."""

from pathlib import Path

from .cache import is_offline
from .errors import DownloadError, ModelNotFound
from .progress import Progress

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "sparsity/*"]


def fetch_from_hub(name: str, progress: Progress) -> Path:
    """The folder of the Hub model `owner/name`."""
    # Imported here: it takes a while, and most models do not come from the Hub.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = is_offline() or constants.HF_HUB_OFFLINE
    if not offline:
        progress.note(f"looking up {name} on the Hugging Face Hub")
    try:
        folder = snapshot_download(name, allow_patterns=PATTERNS, local_files_only=offline)
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the Hub has no model {name!r}, or it is private (then set HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "offline mode is on" if offline else "the Hub cannot be reached"
        raise DownloadError(
            f"the model {name!r} is not in the Hugging Face cache and {reason}: download it where "
            "there is a network, or give a local folder, a GGUF file or `default`"
        ) from error
    return Path(folder)
