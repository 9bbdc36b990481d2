"""The state of the machine: who else is at work, and waiting until nobody is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lab import conditions
from lab.conditions import Watch, busy_share, usage, wait_for_quiet


@pytest.fixture
def said():
    return []


def test_other_work_is_waited_for(said):
    shares = iter([0.9, 0.5, 0.05])
    assert wait_for_quiet(60, said.append, lambda: next(shares))["quiet"] is True
    assert said == ["the machine is 90% busy with other work; waiting up to 60 s"]


def test_the_share_counts_all_but_idle_ticks(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 0 0\n")
    monkeypatch.setattr(conditions, "STAT", stat)
    # 20 busy ones, of which 5 were given to other guests, and 60 idle ones.
    after = "cpu  110 0 105 750 110 0 0 5 0 0\n"
    monkeypatch.setattr(conditions.time, "sleep", lambda _: stat.write_text(after))
    assert busy_share(1) == 0.25


def test_a_case_is_watched_until_the_next_one(said, monkeypatch):
    monkeypatch.setattr(conditions, "wait_for_quiet", lambda *_: {"quiet": True})
    # busy, all, own: of 400 ticks 120 were busy, 80 of them its own.
    ticks = iter([(0, 0, 0), (120, 400, 80), (200, 500, 100), (200, 600, 101)])
    watch = Watch(0, said.append, lambda: next(ticks))
    watch.begin("one")
    watch.begin("two")
    load = watch.load()
    assert said == ["one", "two"]
    assert [state["other_share"] for state in load.values()] == [0.1, 0.0]
    assert watch.load() == load  # once only


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_own_work_and_that_of_children_is_told_from_others():
    before = usage()
    child = subprocess.Popen(
        [sys.executable, "-c", "sum(range(20_000_000)); print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.readline()
    alive = usage()
    child.communicate(b"\n")
    ended = usage()
    assert alive[2] - before[2] >= 5
    assert ended[2] >= alive[2]
