"""The number of processors comes from affinity, quota and OMP_NUM_THREADS, never from the host."""

import os
from pathlib import Path

import pytest

from onnxsim_embed.system.hardware import available_cpus, cgroup_cpus


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def host(monkeypatch):
    """A host of 64 processors, all of them ours, and no OMP_NUM_THREADS."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


V2 = {"proc/self/cgroup": "0::/docker/abc\n"}
V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        (V2, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "max 100000\n"}, 64),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "350000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "50000 100000\n"}, 1),
        (
            V2
            | {"sys/fs/cgroup/docker/cpu.max": "200000 100000\n"}
            | {"sys/fs/cgroup/docker/abc/cpu.max": "800000 100000\n"},
            2,
        ),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "garbage\n"}, 64),
        (
            V1
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000\n"}
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n"}
            | {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}
            | {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            64,
        ),
    ],
)
def test_a_quota_counts_and_the_host_does_not(host, tmp_path, files, cpus):
    assert available_cpus(tree(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("value", "cpus"), [("3", 3), ("3,2", 3), ("0", 64), ("x", 64), ("128", 64)]
)
def test_omp_num_threads_is_respected(host, tmp_path, value, cpus):
    host.setenv("OMP_NUM_THREADS", value)
    assert available_cpus(tmp_path) == cpus


def test_affinity_counts(host, tmp_path):
    host.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert available_cpus(tmp_path) == 1


def test_no_quota_is_none(tmp_path):
    assert cgroup_cpus(tmp_path) is None
