"""Tables of what was measured on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.tables import (
    Result,
    bold,
    joined,
    machine_line,
    number,
    rates_line,
    rounds_line,
    table,
    times,
)

# Ours, whose time is shown in stages.
LEAD = ("ours-int8", "ours-fp32")


def by_speed(result: Result, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the systems, fastest first."""
    rows = [item for item in result["systems"].items() if kind in item[1]["throughput"]]
    return sorted(rows, key=lambda item: -item[1]["throughput"][kind]["texts_per_second"])


def main_kind(result: Result) -> str:
    """Return the kind of texts that a single column is about."""
    kinds = list(result["corpora"])
    return "descriptions" if "descriptions" in kinds else kinds[0]


def kind_title(result: Result, kind: str) -> str:
    """Return what a kind of texts is called: a user's own by the name of the file."""
    source = str(result["corpora"][kind]["source"])
    return source.partition(".")[0] if kind == "texts" else kind


def mean_cosine(result: Result, row: Mapping[str, Any], kind: str) -> str:
    """Return the mean cosine of a system on one kind of texts, for tables of time."""
    cell = row["throughput"].get(kind)
    return f"{cell['fidelity']['mean_cosine']:.5f}" if cell else ""


def cosines(cell: Mapping[str, Any]) -> str:
    """Return mean and least cosine."""
    return f"{cell['fidelity']['mean_cosine']:.5f} / {cell['fidelity']['min_cosine']:.4f}"


def lead_title(result: Result) -> str:
    """Return the short name of the system that others are compared with."""
    return next(iter(result["systems"])).removeprefix("ours-")


def speed_table(result: Result) -> str:
    """Return texts a second of each kind, with the fidelity of the same runs beside them."""
    main, kinds = main_kind(result), list(result["corpora"])
    ranked = result.get("sts") is not None
    names = {kind: kind_title(result, kind) for kind in kinds}
    header = ["texts to unit vectors", *(f"{name}, texts/s" for name in names.values())]
    header += [f"{names[main]}: {lead_title(result)} is ... times as fast"]
    header += [f"{names[main]}: mean / min cosine"]
    header += ["STS Spearman"] if ranked else []
    rows = []
    for name, row in by_speed(result, main):
        cells = row["throughput"]
        line = [bold(name, row["title"])]
        line += [number(cells[k]["texts_per_second"]) if k in cells else "" for k in kinds]
        line += [times(cells[main]["lead_is"]), cosines(cells[main])]
        line += [f"{row['sts_spearman']:.2f}" if "sts_spearman" in row else ""] if ranked else []
        rows.append(line)
    return table(header, rows)


def fidelity_table(result: Result) -> str:
    """Return mean and least cosine of every system on every kind of texts, and its batch sizes."""
    kinds = list(result["corpora"])
    names = [kind_title(result, kind) for kind in kinds]
    header = ["mean / min cosine to the reference", *names, "batch sizes"]
    rows = []
    for name, row in by_speed(result, main_kind(result)):
        cells = [row["throughput"].get(kind) for kind in kinds]
        batches = ", ".join(str((cell or {}).get("batch") or "own") for cell in cells)
        rows.append([bold(name, row["title"]), *(cosines(c) if c else "" for c in cells), batches])
    return table(header, rows)


def latency_table(result: Result) -> str:
    """Return milliseconds of a call of one text and of a few."""
    rows = [item for item in by_speed(result, main_kind(result)) if "latency_ms" in item[1]]
    if not rows:
        return ""
    sizes = list(rows[0][1]["latency_ms"])
    first = next(iter(result["corpora"]))
    header = ["ms a call: p50 / p90 / p99", *(f"{s} text{'s' * (s != '1')}" for s in sizes)]
    header += [f"{kind_title(result, first)}: mean cosine"]
    ordered = sorted(rows, key=lambda item: item[1]["latency_ms"][sizes[0]]["p50"])
    lines = []
    for name, row in ordered:
        cells = [row["latency_ms"][size].values() for size in sizes]
        line = [bold(name, row["title"]), *(" / ".join(map(number, c)) for c in cells)]
        lines.append([*line, mean_cosine(result, row, first)])
    return table(header, lines)


def start_table(result: Result) -> str:
    """Return how long a fresh process takes to its first vector, and how much memory it ever holds."""
    rows = [item for item in result["systems"].items() if "start_seconds" in item[1]]
    if not rows:
        return ""
    header = ["a fresh process", "first vector after, s", "peak resident memory, MB"]
    ordered = sorted(rows, key=lambda item: item[1]["start_seconds"]["median"])
    lines = [
        [bold(n, r["title"]), number(r["start_seconds"]["median"]), number(r["peak_mb"])]
        for n, r in ordered
    ]
    return table(header, lines)


def install_table(result: Result) -> str:
    """Return the size of installations, without models."""
    header = ["a fresh environment", "MB", "packages", "PyTorch in it", "cannot install"]
    rows = [
        [
            bold(name, name),
            number(size.get("mb")),
            str(size.get("packages", "")),
            torch_build(size.get("holds", ())),
            size.get("failed", ""),
        ]
        for name, size in result["installs"].items()
    ]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    said = (
        f"{result['date']}, Python {result['python']}; beyond an empty environment, without models."
    )
    return joined(table(header, rows), said)


def torch_build(packages: Sequence[str]) -> str:
    """Return the version of PyTorch among packages, and whether it is one with CUDA; "" without it."""
    found = [name.partition("-")[2] for name in packages if name.startswith("torch-")]
    cuda = any(name.startswith("nvidia_") for name in packages)
    return f"{found[0]}{', with CUDA' if cuda else ''}" if found else ""


def steady_line(result: Result) -> str:
    """Return whether memory and cost stay flat, in words."""
    passes, texts = result["passes"], result["texts"]
    memory = [
        number(one["resident_mb"]) for one in (passes[0], passes[len(passes) // 2 - 1], passes[-1])
    ]
    costs = result["microseconds_a_token_by_number_of_texts"]
    each = ", ".join(f"{number(cost)} in {int(n):,} texts" for n, cost in costs.items())
    return (
        f"`bench/steady.py`, int8, {result['threads']} threads, {len(passes)} passes over "
        f"{texts['number']:,} texts ({texts['file']}) in one process: {memory[0]} MB resident after the "
        f"first pass, {memory[1]} after half of them, {memory[2]} after the last. "
        f"Microseconds a token: {each}."
    )


def stage_table(result: Result) -> str:
    """Return where our time goes, and the share of the roofline."""
    lines = []
    for name in LEAD:
        for kind, cell in result["systems"].get(name, {}).get("throughput", {}).items():
            parts, whole = cell["stages"], cell["stages"]["all"]
            shares = [f"{parts[part] / whole:.0%}" for part in ("tokenize", "run", "pool", "rest")]
            roof = result["share_of_roofline"].get(name, {}).get(kind)
            speed = number(cell["tokens_per_second"])
            share = "" if roof is None else f"{roof:.0%}"
            title = kind_title(result, kind)
            lines.append([result["systems"][name]["title"], title, *shares, speed, share])
    header = ["where time goes", "texts", "tokenize", "model", "pool", "rest", "tokens/s"]
    return table([*header, "share of the roofline"], lines)


def text_growth_table(result: Result) -> str:
    """Return seconds by the number of texts."""
    rows = {n: r for n, r in result["systems"].items() if r.get("growth_seconds")}
    if not rows:
        return ""
    sizes, first = list(next(iter(rows.values()))["growth_seconds"]), next(iter(result["corpora"]))
    lines = [
        [
            bold(n, r["title"]),
            *(number(r["growth_seconds"].get(s)) for s in sizes),
            mean_cosine(result, r, first),
        ]
        for n, r in rows.items()
    ]
    name = kind_title(result, first)
    header = [f"s a call, {name}", *(f"{int(s):,} texts" for s in sizes), f"{name}: mean cosine"]
    return table(header, lines)


def text_conditions(result: Result) -> str:
    """Return under what conditions texts were measured, in words."""
    corpora = result["corpora"]
    kinds = "; ".join(
        f"{kind_title(result, kind)}: {c['texts']:,} texts of {c['tokens'] / c['texts']:.0f} tokens, "
        f"{c['most_tokens']} at most ({c['source']})"
        for kind, c in corpora.items()
    )
    reference = next(iter(result["systems"].values()))["throughput"][main_kind(result)]["fidelity"][
        "to"
    ]
    title = result["systems"][reference]["title"]
    said = [
        machine_line(result),
        f"{result['model']['name']}. {kinds}.",
        f"{rounds_line(result)}; medians, and ratios as median (least to most).",
        f"Cosines are to {title}.",
        f"The clock runs {result['clock']}.",
    ]
    if result.get("sts"):
        said.append(f"Spearman x100 of cosines with the human scores of {result['sts']}.")
    alone = result["systems"].get("ours-dynamic", {}).get("throughput", {}).get("descriptions", {})
    if "session_is" in alone:
        said.append(
            "Inside the ONNX session alone, on the same batches, our int8 is "
            f"{times(alone['session_is'])} times as fast as quantize_dynamic's."
        )
    rates = result["products_1e9_per_second"]
    said.append(f"Matrix products here, 1e9 operations a second: {rates_line(rates)}.")
    return " ".join(said)
