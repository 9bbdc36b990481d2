"""Fenced blocks of Markdown, and Python from them that must print what the page says."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from typing import NamedTuple

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*\n?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: language, text, first line, and what it must print where that is said."""

    language: str
    text: str
    line: int
    printed: str | None


def blocks(readme):
    found = list(FENCE.finditer(readme))
    for match, after in zip(found, [*found[1:], None], strict=False):
        between = readme[match.end() : after.start()] if after else "more"
        says = after is not None and after[1] == "text" and not between.strip()
        line = readme.count("\n", 0, match.start(2)) + 1
        yield Block(match[1], match[2], line, after[2] if says else None)


def commands(block):
    """The commands of a console block that call this program, continued lines joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ onnxsim-embed"):
            yield line[2:]


def run_python(block, namespace, document):
    printed = io.StringIO()
    # Blank lines before it make line numbers of tracebacks those of the document.
    code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
    with redirect_stdout(printed):
        exec(code, namespace)
    if block.printed is not None:
        assert printed.getvalue().rstrip() == block.printed.rstrip(), f"{document}:{block.line}"
