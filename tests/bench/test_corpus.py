"""Texts of documentation: prose only, of the lengths that their kinds say, the same each time."""

from __future__ import annotations

import pytest
from lab import corpus
from lab.corpus import documentation, file_corpus

WORDS = "The reader returns what was written to the file before it was closed by its owner"
PARAGRAPH = f"{WORDS}. " * 3 + "It raises an error where nothing is left to read."
MODULE = f'''"""{WORDS}.

{PARAGRAPH}

>>> open("x")  # no prose.
a_list, of, names
"""
def function():
    """{PARAGRAPH.replace("reader", "writer")}"""
class Thing:
    """Too short."""
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """One documented module in place of those that are installed."""
    path = tmp_path / "module.py"
    path.write_text(MODULE, encoding="utf-8")
    broken = tmp_path / "broken.py"
    broken.write_text("def (", encoding="utf-8")
    monkeypatch.setattr(corpus, "_sources", lambda: [broken, path])
    return path


def test_short_texts_are_single_sentences(module):
    texts = documentation("short", 100).texts
    assert set(texts) == {
        f"{WORDS}.",
        f"{WORDS.replace('reader', 'writer')}.",
        "It raises an error where nothing is left to read.",
    }
    assert len(texts) == 3  # a sentence that comes again is left out


def test_descriptions_are_whole_paragraphs(module):
    assert documentation("descriptions", 100).texts == (
        PARAGRAPH,
        PARAGRAPH.replace("reader", "writer"),
    )
    assert documentation("descriptions", 1).texts == (PARAGRAPH,)


def test_installed_packages_have_texts_and_names():
    found = documentation("short", 20)
    assert len(set(found.texts)) == 20
    assert all(5 <= len(text.split(" ")) <= 20 for text in found.texts)
    assert "Python 3" in found.source
    assert "numpy" in found.source


def test_a_file_is_spread_and_repeats_nothing():
    given = ["a", "b", "a", "c", "d", "e", "f"]
    assert file_corpus(given, "x.csv", 3).texts == ("a", "c", "e")
    assert file_corpus(given, "x.csv", 100).texts == ("a", "b", "c", "d", "e", "f")
