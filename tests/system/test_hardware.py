"""Which precision suits a machine, by its architecture and its processor's flags."""

import logging
import os
from dataclasses import replace

import pytest
from test_cpus import tree

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.system import hardware as machine
from onnxsim_embed.system.hardware import (
    available_cpus,
    available_memory,
    cpu_flags,
    cpu_name,
    int8_supported,
)

OLD_X86 = frozenset(["fpu", "sse4_2", "avx", "avx2", "fma"])

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: A Processor @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512_vnni
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: none
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
"""


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Say what /proc/cpuinfo holds; None: there is none."""

    def say(text):
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(machine, "CPUINFO", path)

    cpu_name.cache_clear()
    yield say
    cpu_name.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "flags", "suits", "reason"),
    [
        ("x86_64", OLD_X86 | {"avx512_vnni"}, True, "avx512_vnni"),
        ("x86_64", OLD_X86 | {"avx_vnni"}, True, "avx_vnni"),
        ("x86_64", OLD_X86 | {"amx_int8"}, True, "amx_int8"),
        ("AMD64", OLD_X86 | {"avx512_vnni", "avx_vnni"}, True, "avx512_vnni, avx_vnni"),
        ("x86_64", OLD_X86, False, "no VNNI"),
        ("x86_64", OLD_X86 | {"avx512f", "avx512bw"}, False, "no VNNI"),
        ("x86_64", frozenset(), False, "not known"),
        ("AMD64", frozenset(), False, "not known"),
        ("arm64", frozenset(), True, "arm64"),
        ("aarch64", frozenset({"asimd"}), True, "arm64"),
        ("riscv64", frozenset(), False, "riscv64"),
        ("riscv64", OLD_X86 | {"avx_vnni"}, False, "riscv64"),
        ("ppc64le", frozenset(), False, "ppc64le"),
    ],
)
def test_int8_suits_by_architecture_and_flags(architecture, flags, suits, reason):
    found, why = int8_supported(architecture, flags)
    assert found is suits
    assert reason in why
    assert "\n" not in why


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (X86, {"fpu", "sse4_2", "avx2", "avx512_vnni"}),
        (ARM, {"fp", "asimd", "asimddp", "i8mm"}),
        ("processor\t: 0\n", set()),
        ("", set()),
        (b"model name\t: \xff\xfe\nflags\t: avx2\n", {"avx2"}),
        (None, set()),
    ],
)
def test_flags_are_those_of_the_first_processor(cpuinfo, text, flags):
    cpuinfo(text)
    assert cpu_flags() == flags


@pytest.mark.parametrize(
    ("text", "architecture", "suits"),
    [(X86, "x86_64", True), (ARM, "aarch64", True), (None, "x86_64", False)],
)
def test_without_injected_flags_those_of_the_machine_decide(cpuinfo, text, architecture, suits):
    cpuinfo(text)
    assert int8_supported(architecture)[0] is suits


def test_the_processor_is_named(cpuinfo):
    cpuinfo(X86)
    assert cpu_name() == "A Processor @ 2.00GHz"


@pytest.mark.parametrize("text", [ARM, None])
def test_a_processor_without_a_name_is_called_by_its_architecture(cpuinfo, text, monkeypatch):
    cpuinfo(text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_name() == "aarch64"


def test_processors_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert available_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, expected in ((8, 8), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert available_cpus() == expected


# Memory


MEMINFO = {"proc/meminfo": "MemTotal:  16000 kB\nMemFree:  1000 kB\nMemAvailable:    8000 kB\n"}
MACHINE = 8000 * 1024
NO_LIMIT = "9223372036854771712\n"  # what version 1 says for none


def group(path, most, used, cached=0, unified=True):
    """The files of a control group; None leaves one out."""
    base = "sys/fs/cgroup" if unified else "sys/fs/cgroup/memory"
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if unified
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    other = "active_file 77\ninactive_file_not 77\nfile 77\n"
    stat = None if cached is None else f"{other}{names[2]} {cached}\n{other}"
    texts = {names[0]: most, names[1]: used, "memory.stat": stat}
    return {f"{base}{path}/{name}": str(text) for name, text in texts.items() if text is not None}


def v1(path, *values):
    return group(path, *values, unified=False)


V2 = MEMINFO | {"proc/self/cgroup": "0::/docker/abc\n"}
V1 = MEMINFO | {"proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, MACHINE),
        (V2, MACHINE),
        (V2 | group("/docker/abc", "max\n", 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000), 4000),
        (V2 | group("/docker/abc", 9000, 5000, 3000), 7000),
        (V2 | group("/docker/abc", 9000, 5000, None), 4000),  # without memory.stat
        (V2 | group("", 9000, 5000), 4000),  # inside the container only the mount point is there
        (V2 | group("/docker", 9000, 8000) | group("/docker/abc", 9000, 5000), 1000),
        (V2 | group("/docker", "max", 1) | group("/docker/abc", 9000, 5000), 4000),
        (V2 | group("/docker/abc", MACHINE * 2, 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 9500), 0),
        (V2 | group("/docker/abc", None, 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, None), MACHINE),
        (V2 | group("/docker/abc", "", 5000), MACHINE),
        (V2 | group("/docker/abc", "garbage", 5000), MACHINE),
        (V2 | group("/docker/abc", 9000, 5000, "garbage"), 4000),
        (V2 | group("/elsewhere", 9000, 5000), MACHINE),
        (V1, MACHINE),
        (V1 | v1("/docker/abc", 9000, 5000, 3000), 7000),
        (V1 | v1("/docker/abc", 9000, 5000, None), 4000),
        (V1 | v1("/docker/abc", NO_LIMIT, 5000), MACHINE),
        (V1 | v1("", 9000, 5000) | v1("/docker/abc", NO_LIMIT, 5000), 4000),
        (V1 | v1("/docker", 9000, 8000) | v1("/docker/abc", 9000, 5000), 1000),
        (V1 | v1("/x", 9000, 5000), MACHINE),  # the group of another controller
        (V1 | group("/docker/abc", 9000, 5000), MACHINE),  # files of version 2
        (
            MEMINFO
            | {"proc/self/cgroup": "2:memory:/abc\n0::/abc\n"}
            | v1("/abc", 9000, 5000)
            | group("/abc", 9000, 6000),
            3000,
        ),
        (MEMINFO | {"proc/self/cgroup": "nonsense\n\n:\n"}, MACHINE),
    ],
)
def test_free_memory_is_what_the_machine_and_its_groups_leave(tmp_path, files, free):
    assert available_memory(tree(tmp_path, files)) == free


@pytest.mark.parametrize(
    "files", [{}, {"proc/meminfo": "MemTotal: 16000 kB\nMemFree: 1000 kB\n"},
              {"proc/meminfo": "MemAvailable:\n"}, {"proc/meminfo": "MemAvailable: much\n"}]
)  # fmt: skip
def test_where_free_memory_is_not_known_it_is_half_of_all(tmp_path, monkeypatch, files):
    built_in = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", built_in.__getitem__, raising=False)
    root = tree(tmp_path, files)
    assert available_memory(root) == 2_048_000
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(root) is None
    limited = {"proc/self/cgroup": "0::/\n"} | group("", 9000, 5000)
    assert available_memory(tree(tmp_path, limited)) == 4000


def test_this_machine_has_some_memory():
    assert 1 << 20 < available_memory() < 1 << 50


# The choice


@pytest.fixture
def on(cpuinfo, monkeypatch):
    """Pretend to be on a machine."""

    def pretend(architecture, flags):
        monkeypatch.setattr("platform.machine", lambda: architecture)
        cpuinfo(f"flags\t: {flags}\n")

    return pretend


OLD, NEW = ("x86_64", "avx2 fma"), ("x86_64", "avx2 avx512_vnni")


@pytest.mark.parametrize(
    ("where", "precision"),
    [(NEW, "int8"), (("arm64", ""), "int8"), (OLD, "fp32"), (("riscv64", ""), "fp32")],
)
def test_auto_takes_int8_where_it_suits(on, artifact, caplog, where, precision):
    on(*where)
    with caplog.at_level(logging.INFO, "onnxsim_embed"):
        assert Artifact.open(artifact).choose_precision("auto") == precision
    assert len(caplog.records) == (precision == "fp32")
    if precision == "fp32":
        assert caplog.messages[0].startswith("using fp32: ")


def test_a_model_loads_in_fp32_where_int8_would_saturate(on, artifact):
    on(*OLD)
    assert Embedder(artifact).precision == "fp32"
    on(*NEW)
    assert Embedder(artifact).precision == "int8"


def test_int8_may_be_asked_for_anywhere(on, artifact, caplog):
    on(*OLD)
    assert Artifact.open(artifact).choose_precision("int8") == "int8"
    assert Embedder(artifact, precision="int8").precision == "int8"
    assert not caplog.records


@pytest.mark.parametrize("where", [OLD, NEW])
def test_without_an_int8_file_auto_is_fp32_and_says_nothing(on, artifact, caplog, where):
    on(*where)
    opened = Artifact.open(artifact)
    only = {"fp32": opened.manifest.precisions["fp32"]}
    bare = Artifact(opened.directory, replace(opened.manifest, precisions=only))
    assert bare.choose_precision("auto") == "fp32"
    assert not caplog.records
    with pytest.raises(ValueError, match=r"precision 'int8' is not in .*fp32"):
        bare.choose_precision("int8")
