"""What training asks of the C library's allocator."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of unmapping each of them.

    Every step allocates and frees the same large tensors. Mapped anew each time, their pages are
    faulted in and zeroed again. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_* in glibc's malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(top_pad, 256 << 20)
