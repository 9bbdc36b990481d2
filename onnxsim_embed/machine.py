"""What this machine offers this process: processors and their instructions."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def available_cpus() -> int:
    """Return how many processors this process may run on (its affinity), at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


# Processors on which u8 x s8 products are added up in 32 bits. Older x86 ones add pairs in 16 bits,
# which saturates: fast and wrong (onnxruntime#6004).
X86_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")


def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags by Linux's names; empty where they are not known."""
    try:
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def int8_suits(machine: str | None = None, flags: frozenset[str] | None = None) -> tuple[bool, str]:
    """Return whether int8 models run right and fast on this machine, and why.

    :param machine: architecture as `platform.machine()` says it; None for this one.
    :param flags: processor flags; None for this machine's.
    """
    machine = (machine or platform.machine()).lower()
    flags = cpu_flags() if flags is None else flags
    if machine in ("arm64", "aarch64"):
        return True, "arm64 adds int8 products in 32 bits"
    if machine in ("x86_64", "amd64"):
        found = [flag for flag in X86_INT8_FLAGS if flag in flags]
        if found:
            return True, f"the processor has {', '.join(found)}"
        if not flags:
            return False, "the processor's flags are not known here, and x86 without VNNI saturates"
        return False, "the processor has no VNNI, so that its int8 products saturate"
    return False, f"int8 was not tried on {machine}"


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's marketing name, or the architecture where it is not known."""
    try:
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
