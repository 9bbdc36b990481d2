"""bench/run.py: which texts its options choose, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent.parent / "bench" / "run.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_run", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COUNTS", {"short": 20, "descriptions": 10, "texts": 9})
    return module


@pytest.fixture
def given(script, monkeypatch):
    def read(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
        return script.options()

    return read


def test_own_texts_stand_beside_documentation(script, given, texts_csv):
    assert [(c.kind, len(c.texts)) for c in script.corpora(given())] == [
        ("short", 20),
        ("descriptions", 10),
    ]
    own = script.corpora(given("--texts", texts_csv, "--column", "text"))[-1]
    assert (own.kind, own.source, len(own.texts)) == ("texts", texts_csv.name, 9)


def test_kinds_and_shares_choose(script, given, texts_csv):
    words = ("--texts", texts_csv, "--column", "text", "--kinds", "texts")
    assert [c.kind for c in script.corpora(given(*words))] == ["texts"]
    found = script.corpora(given("--kinds", "short", "--share", 0.5))
    assert [(c.kind, len(c.texts)) for c in found] == [("short", 10)]


@pytest.mark.parametrize("option", ["--only", "--cases", "--kinds"])
def test_an_unknown_choice_names_what_there_is(script, given, option):
    given(option, "speed")
    with pytest.raises(SystemExit, match=f"{option} takes .*, got 'speed'"):
        script.main()
