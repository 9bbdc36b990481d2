"""Processors and memory of this process by affinity, control groups and flags."""

import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from onnxsim_embed.system import hardware
from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name, int8_supported
from onnxsim_embed.system.memory import available_memory

X86_CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: A Processor @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512_vnni
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: none
"""
ARM_CPUINFO = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
"""


@pytest.fixture
def root(tmp_path):
    """A function that writes files below a root directory and returns the directory."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(text))
        return tmp_path

    return write


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


def cgroup(path, quota, period=None, version=2):
    base = "sys/fs/cgroup" + ("" if version == 2 else "/cpu")
    values = {"cpu.max": quota} if version == 2 else {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}  # fmt: skip
    return {f"{base}{path}/{name}": value for name, value in values.items()}


V2 = {"proc/self/cgroup": "0::/docker/abc\n"}
V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        (V2, 64),
        (V2 | cgroup("", "200000 100000\n"), 2),
        (V2 | cgroup("/docker/abc", "max 100000\n"), 64),
        (V2 | cgroup("/docker/abc", "350000 100000\n"), 3),
        (V2 | cgroup("/docker/abc", "50000 100000\n"), 1),
        (V2 | cgroup("/docker", "200000 100000") | cgroup("/docker/abc", "800000 100000"), 2),
        (V2 | cgroup("/docker/abc", "garbage\n"), 64),
        (V2 | cgroup("/docker/abc", "100000 0\n"), 64),
        (V1 | cgroup("/docker/abc", 400000, 100000, version=1), 4),
        (V1 | cgroup("/docker/abc", -1, 100000, version=1), 64),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": 200000,
               "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": 100000}, 2)
    ]
)  # fmt: skip
def test_available_cpus_respects_the_quota(host, root, files, cpus):
    assert available_cpus(root(files)) == cpus


@pytest.mark.parametrize(
    ("value", "cpus"), [("3", 3), ("3,2", 3), ("0", 64), ("x", 64), ("128", 64)]
)
def test_available_cpus_respects_omp_num_threads(host, tmp_path, value, cpus):
    host.setenv("OMP_NUM_THREADS", value)
    assert available_cpus(tmp_path) == cpus


def test_available_cpus_respects_affinity(host, tmp_path):
    host.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert available_cpus(tmp_path) == 2
    host.delattr(os, "sched_getaffinity")
    for count, expected in ((8, 8), (None, 1)):
        host.setattr(os, "cpu_count", lambda count=count: count)
        assert available_cpus(tmp_path) == expected


# Instructions and name


OLD = frozenset(["fpu", "sse4_2", "avx", "avx2", "fma"])


@pytest.mark.parametrize(
    ("architecture", "flags", "supported", "reason"),
    [
        ("x86_64", OLD | {"avx512_vnni"}, True, "avx512_vnni"),
        ("x86_64", OLD | {"amx_int8"}, True, "amx_int8"),
        ("AMD64", OLD | {"avx512_vnni", "avx_vnni"}, True, "avx512_vnni, avx_vnni"),
        ("x86_64", OLD | {"avx512f", "avx512bw"}, False, "no VNNI"),
        ("AMD64", frozenset(), False, "unknown"),
        ("arm64", frozenset(), True, "arm64"),
        ("aarch64", frozenset({"asimd"}), True, "arm64"),
        ("riscv64", OLD | {"avx_vnni"}, False, "riscv64"),
    ],
)
def test_int8_support_by_architecture_and_flags(architecture, flags, supported, reason):
    result, why = int8_supported(architecture, flags)
    assert result is supported
    assert reason in why


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (X86_CPUINFO, {"fpu", "sse4_2", "avx2", "avx512_vnni"}),
        (ARM_CPUINFO, {"fp", "asimd", "asimddp", "i8mm"}),
        (b"model name\t: \xff\xfe\nflags\t: avx2\n", {"avx2"}),
    ],
)
def test_flags_are_those_of_the_first_processor(cpuinfo, content, flags):
    cpuinfo(content)
    assert cpu_flags() == flags


@pytest.mark.parametrize("content", ["processor\t: 0\n", "", None])
@pytest.mark.parametrize(
    "module", ["numpy._core._multiarray_umath", "numpy.core._multiarray_umath"]
)
def test_without_cpuinfo_the_flags_are_numpys(cpuinfo, monkeypatch, content, module):
    """As on Windows and macOS."""
    cpuinfo(content)
    features = {"AVX2": True, "AVX512VNNI": True, "AVX512F": False}
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        fake = SimpleNamespace(__cpu_features__=features) if name == module else None
        monkeypatch.setitem(sys.modules, name, fake)
    assert cpu_flags() == {"avx2", "avx512_vnni"}
    assert int8_supported("AMD64") == (True, "the processor has avx512_vnni")


def test_numpy_knows_the_flags_that_linux_reports(cpuinfo):
    flags = cpu_flags()
    if "avx2" not in flags:
        pytest.skip("x86 only")
    cpuinfo(None)
    for flag in ("avx2", "avx512f", "avx512_vnni"):
        assert (flag in cpu_flags()) == (flag in flags)


def test_without_any_source_the_flags_are_unknown(cpuinfo, monkeypatch):
    cpuinfo(None)
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cpu_flags() == frozenset()


def test_cpu_name(cpuinfo, monkeypatch):
    cpuinfo(X86_CPUINFO)
    assert cpu_name() == "A Processor @ 2.00GHz"
    cpu_name.cache_clear()
    cpuinfo(ARM_CPUINFO)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_name() == "aarch64"


# Memory


MACHINE = 8000 * 1024
NO_LIMIT = 9223372036854771712  # what version 1 reports without a limit


def group(path, limit, usage, cached=0, version=2):
    """The files of a control group; None omits one."""
    base = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    other = "active_file 77\ninactive_file_not 77\nfile 77\n"
    statistics = None if cached is None else f"{other}{names[2]} {cached}\n{other}"
    texts = {names[0]: limit, names[1]: usage, "memory.stat": statistics}
    return {f"{base}{path}/{name}": text for name, text in texts.items() if text is not None}


def v1(path, *values):
    return group(path, *values, version=1)


V1_MEMORY = {"proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),
        (V2, MACHINE),
        (V2 | group("/docker/abc", "max\n", 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000, 3000), 7000),
        (V2 | group("/docker/abc", 9000, 5000, None), 4000),  # without memory.stat
        (V2 | group("", 9000, 5000), 4000),  # inside the container only the mount point exists
        (V2 | group("/docker", 9000, 8000) | group("/docker/abc", 9000, 5000), 1000),
        (V2 | group("/docker/abc", MACHINE * 2, 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 9500), 0),
        (V2 | group("/docker/abc", 9000, None), MACHINE),
        (V2 | group("/docker/abc", "garbage", 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000, "garbage"), 4000),
        (V2 | group("/elsewhere", 9000, 5000), MACHINE),
        (V1_MEMORY | v1("/docker/abc", 9000, 5000, 3000), 7000),
        (V1_MEMORY | v1("", 9000, 5000) | v1("/docker/abc", NO_LIMIT, 5000), 4000),
        (V1_MEMORY | v1("/x", 9000, 5000), MACHINE),  # the group of another controller
        ({"proc/self/cgroup": "2:memory:/abc\n0::/abc\n"} | v1("/abc", 9000, 5000)
         | group("/abc", 9000, 6000), 3000),
        ({"proc/self/cgroup": "nonsense\n\n:\n"}, MACHINE)
    ]
)  # fmt: skip
def test_available_memory_is_what_the_machine_and_its_groups_leave(root, monkeypatch, files, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    assert available_memory(root(files)) == free


def test_this_machine_has_some_memory():
    assert 1 << 20 < available_memory() < 1 << 50
