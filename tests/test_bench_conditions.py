"""The state of the machine: who else is at work, and waiting until nobody is."""

from __future__ import annotations

import pytest

from onnxsim_embed.benchmark import conditions
from onnxsim_embed.benchmark.conditions import busy_share, machine, wait_for_quiet


@pytest.fixture
def said():
    return []


def test_a_quiet_machine_is_not_waited_for(said):
    found = wait_for_quiet(60, said.append, lambda: 0.02)
    assert found["quiet"] is True
    assert found["busy_share"] == 0.02
    assert said == []


def test_other_work_is_waited_for(said):
    shares = iter([0.9, 0.5, 0.05])
    assert wait_for_quiet(60, said.append, lambda: next(shares))["quiet"] is True
    assert said == ["the machine is 90% busy with other work; waiting up to 60 s"]


def test_patience_ends_and_the_result_says_so(said):
    found = wait_for_quiet(0, said.append, lambda: 0.7)
    assert found["quiet"] is False
    assert found["busy_share"] == 0.7
    assert said == ["the machine is 70% busy with other work: figures will be uncertain"]


def test_an_unknown_share_is_not_quiet(said):
    assert wait_for_quiet(60, said.append, lambda: None)["quiet"] is False
    assert said == []


def test_the_share_counts_all_but_idle_ticks(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 0 0\n")
    monkeypatch.setattr(conditions, "STAT", stat)
    # 20 busy ones, of which 5 were given to other guests, and 60 idle ones.
    after = "cpu  110 0 105 750 110 0 0 5 0 0\n"
    monkeypatch.setattr(conditions.time, "sleep", lambda _: stat.write_text(after))
    assert busy_share(1) == 0.25


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "STAT", tmp_path / "none")
    assert busy_share(0) is None


def test_the_machine_names_processor_and_threads():
    found = machine(3)
    assert found["threads"] == 3
    assert found["processor"]
    assert found["processors"] >= 1
