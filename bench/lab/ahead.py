"""Where others are ahead of ours, gathered from results."""

from __future__ import annotations

from collections.abc import Iterator

from lab.tables import Result, number, table
from lab.text_tables import kind_title

# A peer with a mean cosine from here on computes what fp32 computes.
FULL_PRECISION = 0.9999


def ahead_table(*results: Result | None) -> str:
    """Return every case in which another system was faster than ours; a sentence where there is none.

    Of throughput medians are compared: our int8 with all others, our fp32 with those as faithful.
    """
    lines: list[list[str]] = []
    for result in results:
        if result is not None:
            lines += _behind(result)
            lines += _behind_in_throughput(result)
    if not lines:
        return "In no case of this run was another system faster."
    return table(["case", "ours", "faster", "times as fast"], lines)


def _behind(result: Result) -> Iterator[list[str]]:
    systems = result["systems"]
    for name, ratio in result["ratios"].items():
        case, _, pair = name.rpartition(": ")
        ours, _, other = pair.partition(" over ")
        if case.startswith("throughput"):
            continue
        if other in systems and not other.startswith("ours") and 0 < ratio["value"] < 1:
            title = systems[ours]["title"]
            yield [case, title, systems[other]["title"], number(1 / ratio["value"])]


def _behind_in_throughput(result: Result) -> Iterator[list[str]]:
    systems = result["systems"]
    for mine, least in (("ours-int8", 0.0), ("ours-fp32", FULL_PRECISION)):
        for kind, own in systems.get(mine, {}).get("throughput", {}).items():
            for name, row in systems.items():
                cell = row["throughput"].get(kind)
                if name.startswith("ours") or cell is None:
                    continue
                times = cell["texts_per_second"] / own["texts_per_second"]
                if times > 1 and cell["fidelity"]["mean_cosine"] >= least:
                    case = f"throughput, {kind_title(result, kind)}"
                    yield [case, systems[mine]["title"], row["title"], number(times)]
