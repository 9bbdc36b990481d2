"""Processes that take turns: protocol, order, clean environment, and systems that fail."""

from __future__ import annotations

import sys

import pytest
from lab.workers import Crew, SystemFailedError, Worker

SYSTEMS = """
import os

def load(name, settings):
    print("chatter on standard output")
    if name == "absent":
        raise ImportError("no module of that name")
    held = []
    def answer(request):
        if request.get("die") == name:
            os._exit(7)
        if request.get("fill"):
            data = bytearray(request["fill"] * 10**6)
            return {"finish": lambda: {"size": len(data)}}
        with open(settings["order"], "a") as stream:
            stream.write(name)
        return {"name": name, "threads": os.environ["OMP_NUM_THREADS"]}
    return answer
"""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "systems.py").write_text(SYSTEMS)
    return {"threads": 2, "order": str(tmp_path / "order")}


@pytest.fixture
def start(tmp_path, settings):
    workers = []

    def make(name):
        file = str(tmp_path / "systems.py")
        workers.append(Worker(name, sys.executable, file, settings, tmp_path / "log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def crew(tmp_path, settings):
    said = []
    with Crew(str(tmp_path / "systems.py"), tmp_path, said.append) as made:
        for name in "ab":
            made.start(name, sys.executable, settings)
        made.said = said
        yield made


def test_a_worker_answers_whatever_it_prints(start):
    worker = start("a")
    answer = worker.ask({"any": 1})
    assert answer["name"] == "a"
    assert answer["threads"] == "2"
    assert 0 < worker.seconds_to_first < 60
    assert "numpy" in worker.ask({"about": True})["versions"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_peak_is_the_request_s_and_what_follows_the_clock_is_not_in_it(start):
    worker = start("a")
    answer = worker.ask({"fill": 60})
    assert answer["size"] == 60 * 10**6
    assert answer["peak_mb"] - answer["before_mb"] > 50
    later = worker.ask({"about": True})
    assert later["peak_mb"] - later["before_mb"] < 30
    assert later["highest_mb"] >= answer["peak_mb"] > later["peak_mb"]


def test_a_system_that_cannot_load_says_why(start):
    with pytest.raises(SystemFailedError, match="ImportError: no module of that name"):
        start("absent")


def test_every_other_round_goes_backwards(crew, settings):
    before = []
    answers = crew.take_turns(lambda name: {"any": 1}, 3, lambda: before.append(1))
    with open(settings["order"]) as stream:
        assert stream.read() == "abbaab"
    assert {name: len(found) for name, found in answers.items()} == {"a": 3, "b": 3}
    assert len(before) == 3


def test_one_that_ends_is_skipped_and_the_others_go_on(crew):
    answers = crew.take_turns(lambda name: {"die": "b"}, 2)
    assert list(answers) == ["a"]
    assert len(answers["a"]) == 2
    assert [worker.name for worker in crew.workers] == ["a"]
    assert crew.failed == {"b": "ended with code 7"}
