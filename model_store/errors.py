"""What can go wrong between a model's name and a folder on disk."""


class ModelStoreError(ValueError):
    """A model name could not be turned into a usable folder; the text names the fix."""


class ModelNotFound(ModelStoreError):
    """The name is no known model, folder, GGUF file or Hub id, or the folder is no model."""


class DownloadError(ModelStoreError):
    """A file that is not in the cache could not be fetched, or is not the file it should be."""


class UnsupportedFile(ModelStoreError):
    """A GGUF file or an adapter holds something this project does not know how to read."""
