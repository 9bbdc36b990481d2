"""Runs the usage that a docstring shows, so that it cannot rot."""

from __future__ import annotations

import inspect
import io
import textwrap
from contextlib import redirect_stdout


def run_usage(documented: object, artifact: object) -> str:
    """Run what stands below "Usage::", on a tiny model; return what it prints."""
    code = textwrap.dedent(inspect.getdoc(documented).partition("Usage::\n")[2])
    assert '"all-MiniLM-L6-v2"' in code
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code.replace('"all-MiniLM-L6-v2"', repr(str(artifact))), {"__name__": "usage"})
    return printed.getvalue().strip()
