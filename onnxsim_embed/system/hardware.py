"""Processors available to this process and their instruction sets."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

CPU_PROVIDER = "CPUExecutionProvider"  # onnxruntime's name
CUDA_PROVIDER = "CUDAExecutionProvider"
GPU_PROVIDERS = (CUDA_PROVIDER, "TensorrtExecutionProvider")

# x86 instructions that accumulate u8 x s8 products in 32 bits. Processors without them add pairs in
# 16 bits, which saturates: fast and wrong (onnxruntime#6004).
X86_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")

# x86 instructions that multiply bfloat16 and accumulate in float32.
X86_BF16_FLAGS = ("avx512_bf16", "amx_bf16")

# They share the directory onnxruntime/: the last one that was installed decides what runs.
WHEELS = [f"onnxruntime{kind}" for kind in ("", "-gpu", "-directml", "-openvino", "-qnn", "-rocm")]


def onnxruntime_wheels() -> list[str]:
    """Return the installed wheels of onnxruntime; they overwrite each other where there are several."""
    wheels = []
    for wheel in WHEELS:
        with suppress(PackageNotFoundError):
            version(wheel)
            wheels.append(wheel)
    return wheels


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of processors that this process may use, at least 1.

    The minimum of its affinity mask, the quota of its control groups (version 1 or 2: the limit of a
    container, which `os.cpu_count` ignores) and `OMP_NUM_THREADS` where it is set.
    """
    limits = [
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ]
    for group, unified in control_groups("cpu", root):
        names = ["cpu.max"] if unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no quota
            values = " ".join((group / name).read_text("utf-8") for name in names).split()
            quota, period = map(int, values)
            if quota > 0:  # a fraction of a processor more would only be throttled
                limits.append(quota // period)
    requested = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if requested.isdecimal() and int(requested) > 0:
        limits.append(int(requested))
    return max(1, min(limits))


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """Yield the control groups that bind this process, and whether each is of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        base = root / "sys/fs/cgroup"
        if controllers:  # version 1
            if controller not in controllers.split(","):
                continue
            base = base / controllers if (base / controllers).is_dir() else base / controller
        # Inside a container the path is often the host's, and only the mount point exists.
        names = [name for name in path.split("/") if name and name != ".."]
        for depth in range(len(names) + 1):
            yield base.joinpath(*names[:depth]), not controllers


def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags under Linux's names; empty if they are unknown."""
    if flags := _cpuinfo("flags", "Features"):
        return frozenset(flags.split())
    # Windows and macOS: numpy's dispatcher, which does not probe avx_vnni and amx_int8.
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):  # 2, 1
        with suppress(ImportError, AttributeError):
            features: dict[str, bool] = importlib.import_module(module).__cpu_features__
            names = {"AVX512VNNI": "avx512_vnni"}
            return frozenset(names.get(name, name.lower()) for name, has in features.items() if has)
    return frozenset()


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's marketing name, or the architecture if the name is unknown."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """Return the first processor's value of one of these keys in /proc/cpuinfo, or ""."""
    with suppress(OSError):
        for line in CPUINFO.read_text("utf-8", errors="replace").splitlines():
            if line.startswith(keys):
                return line.partition(":")[2].strip()
    return ""


def int8_supported(
    machine: str | None = None, flags: frozenset[str] | None = None
) -> tuple[bool, str]:
    """Return whether int8 models are exact and fast on this machine, and the reason."""
    machine = (machine or platform.machine()).lower()
    flags = cpu_flags() if flags is None else flags
    if machine in ("arm64", "aarch64"):
        return True, "arm64 accumulates int8 products in 32 bits"
    if machine not in ("x86_64", "amd64"):
        return False, f"int8 is untested on {machine}"
    if supported := [flag for flag in X86_INT8_FLAGS if flag in flags]:
        return True, f"the processor has {', '.join(supported)}"
    if not flags:
        return False, "the processor's flags are unknown, and int8 saturates on x86 without VNNI"
    return False, "the processor has no VNNI, so int8 products would saturate"


def bf16_supported() -> tuple[bool, str]:
    """Return whether the processor multiplies in bfloat16, and the reason."""
    flags = cpu_flags()
    if supported := [flag for flag in X86_BF16_FLAGS if flag in flags]:
        return True, f"the processor has {', '.join(supported)}"
    return False, f"the processor has neither {' nor '.join(X86_BF16_FLAGS)}"
