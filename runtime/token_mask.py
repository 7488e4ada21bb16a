"""Constrained decoding: which tokens may come next is said by an object of the request's own.

The runtime knows no grammar. Whoever makes a request (the server, with its grammar library) hands
in a `TokenMask`; the sampler asks it before each token and tells it what was chosen. It lives as
long as its request: a sequence that loses its cache keeps its mask, for no token is chosen twice.
Dimension key: V vocabulary, W = ceil(V / 32) words.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import TokenMaskFailed

WORD_BITS = 32


class TokenMask(Protocol):
    """State of one answer's constraint. Called on the engine thread; must return soon.

    What it raises ends its own request with an error, and no other.
    """

    def fill(self, bits_W: Tensor) -> None:
        """Allow tokens: token i may come next where bit i % 32 of word i // 32 is set.

        `bits_W` is int32 on the host, all zero; words beyond the mask's own vocabulary stay so.
        """

    def accept(self, token_id: int) -> None:
        """`token_id` was chosen, a stop token included."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow what was accepted: the answer ends there, reason 'stop'."""


def allowed_tokens(mask: TokenMask, vocab_size: int) -> Tensor:
    """bool allowed_V; at least one token is. Raises `TokenMaskFailed`."""
    bits_W = torch.zeros(-(-vocab_size // WORD_BITS), dtype=torch.int32)
    try:
        mask.fill(bits_W)
    except Exception as error:
        raise _failed(error) from error
    # In numpy: torch would wake its threads for these few bits.
    bits_V = np.unpackbits(bits_W.numpy().view(np.uint8), count=vocab_size, bitorder="little")
    allowed_V = torch.from_numpy(bits_V.view(np.bool_))
    if not bool(allowed_V.any()):
        raise TokenMaskFailed("the constraint on the answer's form lets no token follow")
    return allowed_V


def accept(mask: TokenMask, token_id: int) -> bool:
    """Tell the mask what was chosen; whether the answer ends there. Raises `TokenMaskFailed`."""
    try:
        mask.accept(token_id)
        return mask.is_finished
    except Exception as error:
        raise _failed(error) from error


def _failed(error: Exception) -> TokenMaskFailed:
    return TokenMaskFailed(
        f"the constraint on the answer's form failed: {type(error).__name__}: {error}"
    )
