"""What the C library keeps of memory that was freed; where it is not glibc nothing is done."""

from __future__ import annotations

import ctypes

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_ARENAS = 2


def keep_less() -> None:
    """Let all threads allocate from two arenas. By default each gets one, up to eight per processor, and keeps there
    what it once took: requests are prepared in threads that come and go, so a server would grow for hours."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Let the system have what was freed, such as what loading took."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
