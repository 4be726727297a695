"""Memory of a process that trains or decodes on the CPU: large pages, and freed blocks that are kept.

Two costs that torch leaves in place on Linux. Weights lie on 4 kB pages, so that every product walks the page table. And
glibc hands a block above 32 MB back to the kernel when it is freed; the next operation has to ask for it again, and
the kernel clears it first.
"""

import ctypes
import os
import platform
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h
_tuned = False


def tune_cpu_memory() -> bool:
    """Lets malloc keep what is freed, and puts a heap of half the machine's memory on large pages.

    Address space only: a page counts once it is written to. Once a process, before models load. Returns whether it
    could, which is on Linux with glibc. No result changes; the memory of a process no longer falls after its peak.
    """
    global _tuned
    if _tuned or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return _tuned
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    block = libc.malloc(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)  # grows the heap in one piece
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            libc.madvise(start, end - start, _MADV_HUGEPAGE)
    libc.free(block)
    _tuned = True
    return True
