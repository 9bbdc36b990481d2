"""Generated tables, put between the markers of documents: <!-- bench:NAME --> and <!-- /bench:NAME -->."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import similarity_tables as similar
from lab import text_tables as texts
from lab.ahead import ahead_table
from lab.tables import Result, failed_table, joined

MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def blocks(results: Mapping[str, Result | None]) -> dict[str, str]:
    """Return the generated blocks by the names of their markers.

    :param results: by the names of their files: text, similarity, install, steady; each may miss.
    """
    contents: dict[str, str] = {}
    text, similarity = results.get("text"), results.get("similarity")
    if text is not None:
        contents["speed"] = joined(texts.speed_table(text), texts.text_conditions(text))
        contents["latency"] = joined(texts.latency_table(text), texts.start_table(text))
        contents["detail"] = joined(
            texts.fidelity_table(text), texts.stage_table(text), texts.text_growth_table(text)
        )
    if similarity is not None:
        tables = [similar.similarity_table(similarity, task) for task in ("above", "best")]
        contents["similarity"] = joined(*tables, similar.similarity_conditions(similarity))
        growth = [similar.growth_table(similarity, task) for task in ("above", "best")]
        contents["similarity-growth"] = joined(*growth)
    if (install := results.get("install")) is not None:
        contents["install"] = texts.install_table(install)
    if (steady := results.get("steady")) is not None:
        contents["steady"] = texts.steady_line(steady)
    if text is not None or similarity is not None:
        contents["ahead"] = ahead_table(text, similarity)
        contents["failed"] = failed_table(text, similarity) or "Every system ran."
    return contents


def fill(document: str, contents: Mapping[str, str]) -> str:
    """Return a document with each marked block replaced by the generated one, where there is one."""

    def replace(match: re.Match[str]) -> str:
        block = contents.get(match[2])
        return match[0] if block is None else f"{match[1]}{block}\n{match[3]}"

    return MARKED.sub(replace, document)


# What pictures show, for those who cannot see them.
PICTURES = {
    "speed": "Speed against fidelity, a point for each system",
    "growth": "How time grows with the number of texts and of rows",
    "stages": "Where the time goes",
}


def pictures(directory: Path, document: Path) -> dict[str, str]:
    """Return the blocks that show a directory's pictures in a document."""
    return {
        f"picture-{name}": f"![{says}]({Path(os.path.relpath(path, document.parent)).as_posix()})"
        for name, says in PICTURES.items()
        if (path := directory / f"{name}.png").exists()
    }


def fill_files(paths: Sequence[Path], contents: Mapping[str, str], directory: Path) -> None:
    """Fill the marked blocks of files.

    :param directory: where the pictures are.
    """
    for path in paths:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, {**contents, **pictures(directory, path)})
        if filled != text:
            path.write_text(filled, encoding="utf-8")
