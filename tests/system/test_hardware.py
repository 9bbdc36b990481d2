"""Processors and memory of this process by affinity, control groups and flags."""

import os
import sys
from functools import partial
from types import SimpleNamespace

import psutil
import pytest

from onnxsim_embed.system import hardware
from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name, int8_supported
from onnxsim_embed.system.memory import available_memory

X86_CPUINFO = """processor\t: 0
model name\t: A Processor @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512_vnni

processor\t: 1
flags\t\t: none
"""
ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd i8mm\n"
NUMPY = ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath")


def write_files(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """A function that replaces /proc/cpuinfo; None: it does not exist."""

    def write(content):
        path = tmp_path / "cpuinfo"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(hardware, "CPUINFO", path)

    cpu_name.cache_clear()
    yield write
    cpu_name.cache_clear()


# Processors


@pytest.fixture
def host(monkeypatch):
    """A host of 64 processors, all of them available, without OMP_NUM_THREADS."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


def cgroup(path, quota):
    return {f"sys/fs/cgroup{path}/cpu.max": quota}


def cgroup_v1(path, quota):
    return {f"sys/fs/cgroup/{path}/docker/abc/cpu.cfs_{name}_us": value
            for name, value in (("quota", quota), ("period", 100000))}  # fmt: skip


V2 = {"proc/self/cgroup": "0::/docker/abc\n"}
V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        (V2 | cgroup("", "200000 100000\n"), 2),
        (V2 | cgroup("/docker/abc", "max 100000\n"), 64),
        (V2 | cgroup("/docker/abc", "350000 100000\n"), 3),
        (V2 | cgroup("/docker/abc", "50000 100000\n"), 1),
        (V2 | cgroup("/docker", "200000 100000") | cgroup("/docker/abc", "800000 100000"), 2),
        (V2 | cgroup("/docker/abc", "100000 0\n"), 64),
        (V1 | cgroup_v1("cpu", 400000), 4),
        (V1 | cgroup_v1("cpu", -1), 64),
        (V1 | cgroup_v1("cpu,cpuacct", 200000), 2)
    ]
)  # fmt: skip
def test_available_cpus_respects_the_quota(host, tmp_path, files, cpus):
    assert available_cpus(write_files(tmp_path, files)) == cpus


def test_available_cpus_respects_omp_num_threads_and_affinity(host, tmp_path):
    for value, cpus in (("3", 3), ("3,2", 3), ("0", 64), ("x", 64), ("128", 64)):
        host.setenv("OMP_NUM_THREADS", value)
        assert available_cpus(tmp_path) == cpus
    host.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert available_cpus(tmp_path) == 2
    host.delattr(os, "sched_getaffinity")
    for count, expected in ((8, 8), (None, 1)):
        host.setattr(os, "cpu_count", lambda count=count: count)
        assert available_cpus(tmp_path) == expected


# Instructions and name


@pytest.mark.parametrize(
    ("architecture", "flags", "supported", "reason"),
    [("x86_64", {"avx2", "avx512_vnni"}, True, "avx512_vnni"),
     ("AMD64", {"avx_vnni", "amx_int8"}, True, "avx_vnni, amx_int8"),
     ("x86_64", {"avx512f", "avx512bw"}, False, "no VNNI"), ("AMD64", set(), False, "unknown"),
     ("arm64", set(), True, "arm64"), ("aarch64", {"asimd"}, True, "arm64"),
     ("riscv64", {"avx_vnni"}, False, "riscv64")],
)  # fmt: skip
def test_int8_support_by_architecture_and_flags(architecture, flags, supported, reason):
    result, why = int8_supported(architecture, frozenset(flags))
    assert result is supported
    assert reason in why


@pytest.mark.parametrize(
    ("content", "flags", "name"),
    [(X86_CPUINFO, {"fpu", "sse4_2", "avx2", "avx512_vnni"}, "A Processor @ 2.00GHz"),
     (ARM_CPUINFO, {"fp", "asimd", "i8mm"}, "aarch64"),
     (b"model name\t: \xff\nflags\t: avx2\n", {"avx2"}, "\ufffd")],
)  # fmt: skip
def test_flags_and_name_are_those_of_the_first_processor(
    cpuinfo, monkeypatch, content, flags, name
):
    cpuinfo(content)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert (cpu_flags(), cpu_name()) == (flags, name)


@pytest.mark.parametrize("content", ["processor\t: 0\n", None])
@pytest.mark.parametrize("module", [*NUMPY, None])
def test_without_cpuinfo_the_flags_are_numpys(cpuinfo, monkeypatch, content, module):
    """As on Windows and macOS."""
    flags = cpu_flags()
    cpuinfo(content)
    if "avx2" in flags:  # of this machine: numpy and Linux agree
        for flag in ("avx2", "avx512f", "avx512_vnni"):
            assert (flag in cpu_flags()) == (flag in flags)
    features = {"AVX2": True, "AVX512VNNI": True, "AVX512F": False}
    for name in NUMPY:
        fake = SimpleNamespace(__cpu_features__=features) if name == module else None
        monkeypatch.setitem(sys.modules, name, fake)
    assert cpu_flags() == ({"avx2", "avx512_vnni"} if module else set())
    assert int8_supported("AMD64")[0] is (module is not None)


# Memory


MACHINE = 8000 * 1024
NO_LIMIT = 9223372036854771712  # what version 1 reports without a limit


def group(path, limit, usage, cached=0, base="sys/fs/cgroup", names=("max", "current", "")):
    """The files of a control group; None omits one."""
    other = "active_file 77\ninactive_file_not 77\nfile 77\n"
    statistics = None if cached is None else f"{other}{names[2]}inactive_file {cached}\n{other}"
    texts = {names[0]: limit, names[1]: usage, "stat": statistics}
    return {f"{base}{path}/memory.{name}": text for name, text in texts.items() if text is not None}


v1 = partial(
    group, base="sys/fs/cgroup/memory", names=("limit_in_bytes", "usage_in_bytes", "total_")
)


V1_MEMORY = {"proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),
        (V2 | group("/docker/abc", "max\n", 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000, 3000), 7000),
        (V2 | group("/docker/abc", 9000, 5000, None), 4000),  # without memory.stat
        (V2 | group("", 9000, 5000), 4000),  # inside the container only the mount point exists
        (V2 | group("/docker", 9000, 8000) | group("/docker/abc", 9000, 5000), 1000),
        (V2 | group("/docker/abc", MACHINE * 2, 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 9500), 0),
        (V2 | group("/docker/abc", 9000, None), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000, "garbage"), 4000),
        (V1_MEMORY | v1("/docker/abc", 9000, 5000, 3000), 7000),
        (V1_MEMORY | v1("", 9000, 5000) | v1("/docker/abc", NO_LIMIT, 5000), 4000),
        (V1_MEMORY | v1("/x", 9000, 5000), MACHINE),  # the group of another controller
        ({"proc/self/cgroup": "2:memory:/abc\n0::/abc\n"} | v1("/abc", 9000, 5000)
         | group("/abc", 9000, 6000), 3000),
        ({"proc/self/cgroup": "nonsense\n\n:\n"}, MACHINE)
    ]
)  # fmt: skip
def test_available_memory_is_what_the_machine_and_its_groups_leave(
    tmp_path, monkeypatch, files, free
):
    assert 1 << 20 < available_memory() < 1 << 50  # of this machine
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    assert available_memory(write_files(tmp_path, files)) == free
