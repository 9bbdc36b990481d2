"""Results written: JSON first, then tables and pictures made from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab.documents import blocks, fill_files
from onnxsim_embed.files.atomic import atomic_file

NAMES = ("text", "similarity", "install", "steady")
COMPARED = ("text", "similarity")

# Ratios of alternating rounds still move by a tenth on a shared machine.
TOLERANCE = 0.15


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work:
        work.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_results(directory: Path) -> dict[str, dict[str, Any] | None]:
    """Return the results of a directory by their names; None for those that do not exist."""
    results: dict[str, dict[str, Any] | None] = {}
    for name in NAMES:
        path = directory / f"{name}.json"
        results[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return results


def write_report(directory: Path, documents: Sequence[Path], say: Callable[[str], None]) -> None:
    """Make tables and pictures from the results of a directory.

    :param documents: files whose marked blocks are replaced.
    """
    results = read_results(directory)
    contents = blocks(results)
    report = "\n\n".join(f"## {name}\n{block}" for name, block in contents.items() if block)
    (directory / "tables.md").write_text(report + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        say("no pictures: pip install 'onnxsim-embed[plot]'")
    else:
        draw(directory, results["text"], results["similarity"])
    fill_files(documents, contents, directory)


def draw(directory: Path, text: dict[str, Any] | None, similarity: dict[str, Any] | None) -> None:
    """Draw the pictures of results into a directory."""
    from lab.pictures import draw_growth, draw_speed, draw_stages

    if text is not None:
        draw_speed(text, directory / "speed.png")
        draw_stages(text, directory / "stages.png")
    draw_growth(text, similarity, directory / "growth.png")


def compare(committed: Path, fresh: Path, say: Callable[[str], None]) -> bool:
    """Compare the ratios of fresh results with committed ones; say what fell; return whether none did.

    Only ratios of the same texts, vectors and threads are compared.
    """
    before, now = read_results(committed), read_results(fresh)
    good, compared = True, 0
    for name in COMPARED:
        old, new = before[name], now[name]
        if old is None or new is None:
            continue
        if old["machine"]["threads"] != new["machine"]["threads"]:
            say(
                f"{name}: {new['machine']['threads']} threads, not {old['machine']['threads']}: skipped"
            )
            continue
        if old["machine"]["processor"] != new["machine"]["processor"]:
            say(f"{name}: another processor; its ratios are its own")
        earlier, later = old["ratios"], new["ratios"]
        both = [key for key in earlier if key in later and earlier[key]["value"] > 0]
        left = {
            key: later[key]["value"] / earlier[key]["value"]
            for key in both
            if later[key]["of"] == earlier[key]["of"]
        }
        compared += len(left)
        if other := len(both) - len(left):
            say(f"{name}: {other} ratios are of other texts or vectors: skipped")
        for key in sorted(left, key=left.__getitem__):
            if left[key] < 1 - TOLERANCE:
                values = f"{earlier[key]['value']:.2f} -> {later[key]['value']:.2f}"
                say(f"{name}: {key}: {values}, {1 - left[key]:.0%} less")
                good = False
    if not compared:
        say(f"nothing to compare: {committed} and {fresh} share no ratio of the same texts")
        return False
    say(f"{compared} ratios compared: {'none fell' if good else 'those above fell'}")
    return good
