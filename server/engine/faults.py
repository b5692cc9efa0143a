"""Which failures are a lack of memory."""

from __future__ import annotations

import torch

_MARKS = ("std::bad_alloc", "can't allocate memory")  # of the native runner, of torch on the CPU


def lacks_memory(error: Exception) -> bool:
    """Whether less work at once might have gone well."""
    told = isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)
