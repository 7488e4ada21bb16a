"""What `prosparse` refuses: a message for the user instead of a traceback."""


class BadInput(ValueError):
    """A model, a file or a setting cannot be used; the text says why and what to do instead."""
