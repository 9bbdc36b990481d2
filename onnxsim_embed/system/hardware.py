"""What this machine offers this process: processors and their instructions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

CPU_PROVIDER = "CPUExecutionProvider"  # onnxruntime's name
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def available_cpus(root: Path = Path("/")) -> int:
    """Return how many processors this process may really use, at least 1.

    The least of its affinity, the quota of its control group (version 1 or 2; a container's limit,
    which the number of the host's processors does not show), and `OMP_NUM_THREADS` where it is set.

    :param root: where /proc and /sys are.
    """
    limits = [
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ]
    if (quota := cgroup_cpus(root)) is not None:
        limits.append(int(quota))  # a part of a processor more would only be throttled
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        limits.append(int(asked))
    return max(1, min(limits))


def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """Return the processors that the control group's quota allows, or None where there is no limit.

    A group is bound by every group above it as well; the tightest counts.

    :param root: where /proc and /sys are.
    """
    quotas = [_quota_v2(g) if unified else _quota_v1(g) for g, unified in _groups(root, "cpu")]
    known = [quota for quota in quotas if quota is not None]
    return min(known) if known else None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the control groups that bind this process, and whether each is of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        base = root / "sys/fs/cgroup"
        if controllers:  # version 1
            if controller not in controllers.split(","):
                continue
            named = base / controllers
            base = named if named.is_dir() else base / controller
        # Inside a container the path is often the host's, and only the mount point is there.
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            yield base.joinpath(*parts[:depth]), not controllers


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take, or None where it is not known.

    The least of what the machine has free and what its control groups leave; caches of files count as
    free.

    :param root: where /proc and /sys are.
    """
    free = [_free_of_group(group, unified) for group, unified in _groups(root, "memory")]
    free.append(_free_of_machine(root))
    known = [value for value in free if value is not None]
    return max(0, min(known)) if known else None


def _free_of_machine(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # no Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _free_of_group(group: Path, unified: bool) -> int | None:
    names = ("memory.max", "memory.current", "inactive_file")
    if not unified:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        most, used = ((group / name).read_text(encoding="utf-8").strip() for name in names[:2])
        if most == "max":
            return None
        free = int(most) - int(used)
    except (OSError, ValueError):
        return None
    try:
        for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines():
            if line.startswith(names[2] + " "):
                free += int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass  # without it, caches count as used
    return free


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


def int8_supported(
    machine: str | None = None, flags: frozenset[str] | None = None
) -> tuple[bool, str]:
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
