"""Model names -> Hugging Face folders on disk.

Owns the cache folder, and as package data the default model's adapter and predictors. Imports
none of the other packages; all of them may use it.
"""

from .cache import cache_root
from .errors import DownloadError, ModelNotFound, ModelStoreError
from .resolve import DEFAULT_MODEL, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "DownloadError",
    "ModelNotFound",
    "ModelStoreError",
    "cache_root",
    "resolve_model",
]
