"""Tables of what was measured of similarities."""

from __future__ import annotations

from lab.tables import Result, bold, machine_line, number, rates_line, rounds_line, table, times


def similarity_table(result: Result, task: str) -> str:
    """Return time, ratio, memory and exactness of a task on all rows."""
    rows = str(result["vectors"]["rows"])
    cells = [
        (n, r["title"], r[task][rows])
        for n, r in result["systems"].items()
        if rows in r.get(task, {})
    ]
    what = f"above {result['threshold']}" if task == "above" else f"{result['k']} best of each"
    header = [f"{int(rows):,} rows, {what}", "s", "ours is ... times as fast", "entries"]
    header += ["wrong entries", "MB above input and output"]
    ordered = sorted(cells, key=lambda item: item[2]["seconds"]["median"])
    lines = [
        [
            bold(name, title),
            number(cell["seconds"]["median"]),
            times(cell["ours_is"]),
            f"{cell['entries']:,}",
            f"{cell['wrong']:,}",
            number(cell.get("above_input_and_output_mb")),
        ]
        for name, title, cell in ordered
    ]
    return table(header, lines)


def growth_table(result: Result, task: str) -> str:
    """Return seconds by the number of rows."""
    cells = {n: r[task] for n, r in result["systems"].items() if task in r}
    sizes = sorted({int(size) for row in cells.values() for size in row})
    what = f"above {result['threshold']}" if task == "above" else f"{result['k']} best of each"
    header = [f"s, {what}", *(f"{size:,} rows" for size in sizes), "wrong entries"]
    lines = []
    for name, row in cells.items():
        medians = [row[str(s)]["seconds"]["median"] if str(s) in row else None for s in sizes]
        wrong = sum(cell["wrong"] for cell in row.values())
        title = bold(name, result["systems"][name]["title"])
        lines.append([title, *map(number, medians), f"{wrong:,}"])
    return table(header, lines)


def similarity_conditions(result: Result) -> str:
    """Return under what conditions similarity was measured, in words."""
    vectors = result["vectors"]
    said = [
        machine_line(result),
        f"Vectors: {vectors['rows']:,} of {vectors['dim']}, {vectors['source']}.",
        f"{rounds_line(result)}. Wrong: differs from dense float64 by more than 1e-6.",
        f"The clock runs {result['clock']}.",
    ]
    rates = {"numpy": result["products_1e9_per_second"]["numpy"]}
    said.append(f"float32 products here, 1e9 operations a second: {rates_line(rates)}.")
    for name, share in result["share_of_float32_roofline"].items():
        said.append(
            f"{result['systems'][name]['title']} reaches {share:.2f} of that on half the square."
        )
    for name, limit in result["limits"].items():
        title = result["systems"][name]["title"]
        said.append(f"{title} was measured up to {limit['rows']:,} rows: {limit['because']}.")
    large = result.get("large")
    if large and "seconds" in large:
        said.append(
            f"The {result['k']} best of each of {large['rows']:,} rows (tiled, with noise): "
            f"{number(large['seconds'])} s, {number(large['highest_mb'])} MB resident at most, "
            f"{large['cost_per_pair_to_base']:.2f} times the cost per pair of "
            f"{large['rows_base']:,} rows."
        )
    return " ".join(said)
