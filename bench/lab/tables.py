"""Markdown tables: their cells, and what both kinds of results share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsim_embed.benchmark.measure import MAX_BUSY

Result = Mapping[str, Any]

# What stands out in tables.
OURS = ("ours", "ours-int8", "ours-fp32", "onnxsim-embed")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned for readers of the source and of a terminal."""
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with N significant digits, thousands separated; "" for None."""
    if value is None:
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}"
    return text.rstrip(".")


def times(cell: Mapping[str, Any] | None) -> str:
    """Return a ratio with its spread, or nothing."""
    return (
        "" if cell is None else f"{cell['median']:.2f} ({cell['least']:.2f} to {cell['most']:.2f})"
    )


def bold(name: str, title: str) -> str:
    """Return a title; ours stand out."""
    return f"**{title}**" if name in OURS else title


def joined(*parts: str) -> str:
    """Return parts with empty lines between them."""
    return "\n\n".join(part for part in parts if part)


def load_line(load: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how much of the processors other work took while cases were measured."""
    shares = {case: state["other_share"] for case, state in load.items()}
    limit = f"{MAX_BUSY:.0%} of the processors during"
    if busy := [f"{case} ({share:.0%})" for case, share in shares.items() if share > MAX_BUSY]:
        # Said, because it flatters us: our threads do not wait for each other.
        return (
            f"Other work took more than {limit}: {'; '.join(busy)}. Systems whose threads wait for each "
            "other lose most by that: on an idle machine expect smaller differences."
        )
    return f"Other work took at most {max(shares.values()):.0%} of the processors during any case."


def machine_line(result: Result) -> str:
    """Return day, machine, threads, and how much other work there was."""
    machine = result["machine"]
    kind = "virtual " if machine["virtual"] else ""
    special = ", ".join(f for f in machine["instructions"] if "vnni" in f or "amx" in f)
    return (
        f"{result['date']}. {machine['threads']} threads on {machine['processors']} {kind}processors, "
        f"{machine['processor']}{f' ({special})' if special else ''}, {machine['system']}. "
        f"{load_line(result['load'])}"
    )


def rounds_line(result: Result) -> str:
    """Return how many rounds there were."""
    return "One round" if result["rounds"] == 1 else f"{result['rounds']} alternating rounds"


def rates_line(rates: Mapping[str, Any]) -> str:
    """Return the rates of products."""
    return ", ".join(f"{name} {number(rate['median'])}" for name, rate in rates.items())


def failed_table(*results: Result | None) -> str:
    """Return what could not run, and why."""
    lines = [
        [name, reason.replace("|", "\\|")]
        for result in results
        if result is not None
        for name, reason in result["failed"].items()
    ]
    return table(["could not run", "reason"], lines) if lines else ""
