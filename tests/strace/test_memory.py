"""Threads share malloc's arenas, where malloc is glibc's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, threading
from strace import memory
{first}
libc, barrier = ctypes.CDLL(None), threading.Barrier(24)
libc.malloc.restype = ctypes.c_void_p
def work():
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(24)]
for thread in threads: thread.start()
for thread in threads: thread.join()
memory.give_back()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's malloc")
def test_arenas_are_few() -> None:
    def count(first: str) -> int:
        command = [sys.executable, "-c", COUNT.format(first=first)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("<heap nr=")

    assert count("") > 2
    assert count("memory.keep_less()") <= 2
