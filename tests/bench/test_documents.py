"""Tables, and the marked blocks of documents that they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.documents import MARKED, fill

ROOT = Path(__file__).parent.parent.parent
KNOWN = {"speed", "latency", "detail", "similarity", "similarity-growth", "failed", "install", "steady", "ahead",
         "picture-speed", "picture-growth", "picture-stages"}  # fmt: skip


def test_only_blocks_that_were_made_are_replaced():
    document = "\n".join(
        f"<!-- bench:{name} -->\n{name}\n<!-- /bench:{name} -->" for name in ("speed", "other-one")
    )
    filled = fill(document, {"speed": "| new |", "latency": "unused"})
    assert "<!-- bench:speed -->\n| new |\n<!-- /bench:speed -->" in filled
    assert "<!-- bench:other-one -->\nother-one\n<!-- /bench:other-one -->" in filled
    assert fill(filled, {"speed": "| new |"}) == filled


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_documents_have_blocks_that_are_made(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [match[2] for match in MARKED.finditer(text)]
    assert found
    assert set(found) <= KNOWN
    assert len(set(found)) == len(found)
    assert text.count("<!-- bench:") == text.count("<!-- /bench:") == len(found)
