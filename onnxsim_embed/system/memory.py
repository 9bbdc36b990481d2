"""Memory available to this process."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

from onnxsim_embed.system.hardware import control_groups

RELEASE_BYTES = 64_000_000
_held = 0  # bytes of this process after `release_memory` released some


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still allocate."""
    import psutil

    free = [int(psutil.virtual_memory().available)]
    for group, unified in control_groups("memory", root):
        limit, usage, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if unified
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        with suppress(OSError, ValueError):  # "max" is no limit
            left = int((group / limit).read_text("utf-8")) - int((group / usage).read_text("utf-8"))
            with suppress(OSError, ValueError):  # without memory.stat the cache counts as used
                statistics = dict(
                    map(str.split, (group / "memory.stat").read_text("utf-8").splitlines())
                )
                left += int(statistics.get(cache, 0))
            free.append(left)
    return max(0, min(free))


def release_memory() -> None:
    """Return free memory to the operating system, where the C library can (glibc) and it pays.

    It takes a second beside PyTorch, so that it waits until RELEASE_BYTES are held more than after the
    last time.
    """
    import psutil

    global _held
    process = psutil.Process()
    if process.memory_info().rss < _held + RELEASE_BYTES:
        return
    gc.collect()  # models of PyTorch refer to themselves
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    _held = process.memory_info().rss
