"""mkdocs hook: the tables that the benchmarks write into bench/README.md appear in the site too."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "bench" / "README.md"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace `<!-- include bench:NAME -->` by the block of that name."""

    def block(match: re.Match[str]) -> str:
        name = re.escape(match[1])
        found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", results, re.DOTALL)
        if found is None:
            raise LookupError(f"{RESULTS} has no block {match[1]}")
        return found[1]

    results = RESULTS.read_text(encoding="utf-8")
    return re.sub(r"<!-- include (bench:[\w-]+) -->", block, markdown)
