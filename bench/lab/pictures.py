"""Pictures of results: speed against fidelity, growth, and where time goes. Needs the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.tables import OURS
from lab.text_tables import LEAD, kind_title, main_kind

Result = Mapping[str, Any]

# Of curves: ours are warm and thick, others cold and thin.
OUR_CURVES = ("#c44e52", "#dd8452", "#937860")
THEIR_CURVES = (
    "#4c72b0",
    "#55a868",
    "#8172b3",
    "#64b5cd",
    "#8c8c8c",
    "#1b9e77",
    "#3a3a8c",
    "#b3b300",
    "#000000",
)

OUR_COLOUR, THEIR_COLOUR = "#c44e52", "#4c72b0"
STAGE_COLOURS = {"tokenize": "#8172b3", "model": "#c44e52", "pool": "#55a868", "rest": "#cccccc"}

# Width of a character of a label, and how far up or down labels are tried, in points of print.
CHARACTER = 4.6
LABEL_HEIGHTS = (0.0, 13.0, -13.0, 26.0, -26.0, 39.0, -39.0, 52.0, -52.0)

# Below this, a difference of cosines is float32's rounding.
LEAST_ERROR = 1e-7


def new_figure(width: float, height: float) -> Any:  # noqa: ANN401 - matplotlib is untyped
    """Return a figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def draw_speed(result: Result, path: Path) -> None:
    """Draw one point a system: texts a second against the mean error of its cosines."""
    kind = main_kind(result)
    points = []
    for name, row in result["systems"].items():
        cell = row["throughput"].get(kind)
        if cell is not None:
            error = max(LEAST_ERROR, 1 - cell["fidelity"]["mean_cosine"])
            points.append((cell["texts_per_second"], error, row["title"], name in OURS))
    figure = new_figure(9, 5.2)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    speeds, errors = [point[0] for point in points], [point[1] for point in points]
    low, high = min(speeds) * 0.8, max(speeds) * 1.25
    axes.set_xlim(low, high)
    axes.set_ylim(max(errors) * 4, LEAST_ERROR / 8)  # better is up, and right
    ticks = nice_ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    name, threads = kind_title(result, kind), result["machine"]["threads"]
    axes.set_xlabel(f"{name}: texts a second, {threads} threads (better: right)")
    axes.set_ylabel("1 - mean cosine to PyTorch fp32 (better: up; top: rounding)")
    axes.grid(alpha=0.3)
    # Where points come to lie, in points of print; layout must not move the axes afterwards.
    figure.draw_without_rendering()
    spots = [
        tuple(axes.transData.transform((speed, error)) * 72 / figure.dpi)
        for speed, error, *_ in points
    ]
    edges = axes.get_window_extent().extents[[0, 2]] * 72 / figure.dpi
    widths = [CHARACTER * len(title) * (1.2 if mine else 1) for _, _, title, mine in points]  # bold
    shifts = place_labels(spots, widths, (edges[0], edges[1]))
    for (speed, error, title, mine), (across, up) in zip(points, shifts, strict=True):
        colour = OUR_COLOUR if mine else THEIR_COLOUR
        axes.plot([speed], [error], "o", color=colour, markersize=9 if mine else 7)
        axes.annotate(
            title,
            (speed, error),
            xytext=(across, up),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            fontweight="bold" if mine else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4} if up else None,
        )
    figure.savefig(path)


def place_labels(
    spots: Sequence[tuple[float, float]], widths: Sequence[float], edges: tuple[float, float]
) -> list[tuple[float, float]]:
    """Return how far each label moves from its spot, so that none covers another label or a spot.

    :param spots: across and up, in points of print.
    :param widths: of the labels.
    :param edges: what labels must stay between, across.
    :returns: for each label the way from its spot to its left end: across and up.
    """
    boxes = [(x - 5, x + 5, y - 5, y + 5) for x, y in spots]
    shifts = []
    for (x, y), width in zip(spots, widths, strict=True):
        ways = [(side, up) for up in LABEL_HEIGHTS for side in (9.0, -9.0 - width)]
        inside = [way for way in ways if edges[0] < x + way[0] and x + way[0] + width < edges[1]]
        for across, up in inside or ways:
            box = (x + across, x + across + width, y + up - 5, y + up + 5)
            if not any(
                box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes
            ):
                break
        else:
            across, up = (inside or ways)[0]
            box = (x + across, x + across + width, y + up - 5, y + up + 5)
        boxes.append(box)
        shifts.append((across, up))
    return shifts


def nice_ticks(low: float, high: float) -> list[float]:
    """Return 1, 1.5, 2, 3, 5 and 7 times powers of ten within a range."""
    steps = [factor * 10.0**power for power in range(-3, 7) for factor in (1, 1.5, 2, 3, 5, 7)]
    return [step for step in steps if low <= step <= high]


def draw_growth(text: Result | None, similarity: Result | None, path: Path) -> None:
    """Draw seconds against n: texts encoded, pairs above a threshold, the k best."""
    panels: list[tuple[str, str, dict[str, dict[int, float]]]] = []
    if text is not None:
        curves = {
            row["title"]: {int(n): s for n, s in row["growth_seconds"].items()}
            for row in text["systems"].values()
            if row.get("growth_seconds")
        }
        name = kind_title(text, next(iter(text["corpora"])))
        panels.append((f"encoding, {name}", "texts", curves))
    for task in ("above", "best") if similarity is not None else ():
        assert similarity is not None
        curves = {
            row["title"]: {int(n): cell["seconds"]["median"] for n, cell in row[task].items()}
            for row in similarity["systems"].values()
            if task in row
        }
        k, threshold = similarity["k"], similarity["threshold"]
        name = f"all pairs above {threshold}" if task == "above" else f"{k} best of each row"
        panels.append((name, "rows", curves))
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure = new_figure(4.6 * len(panels), 5.6)
    for number, (name, unit, curves) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        colours = {True: iter(OUR_CURVES), False: iter(THEIR_CURVES)}
        for title, curve in curves.items():
            mine = title.startswith("onnxsim-embed")
            axes.plot(list(curve), list(curve.values()), "o-", label=title, markersize=4,
                      linewidth=2.4 if mine else 1.2, zorder=3 if mine else 2,
                      color=next(colours[mine], None))  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(unit)
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3, which="both")
        sizes = sorted({size for curve in curves.values() for size in curve})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path)


def draw_stages(result: Result, path: Path) -> None:
    """Draw the share of each stage in our time, for each kind of texts."""
    bars = [
        (f"{name.removeprefix('ours-')}, {kind_title(result, kind)}", cell["stages"])
        for name in LEAD
        for kind, cell in result["systems"].get(name, {}).get("throughput", {}).items()
    ]
    figure = new_figure(8, 1.3 + 0.42 * len(bars))
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for stage, colour in STAGE_COLOURS.items():
        key = {"model": "run"}.get(stage, stage)
        shares = [100 * parts[key] / parts["all"] for _, parts in bars]
        axes.barh([label for label, _ in bars], shares, left=left, color=colour, label=stage)
        for position, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 4:
                axes.text(start + share / 2, position, f"{share:.0f}", ha="center", va="center",
                          fontsize=8)  # fmt: skip
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time from texts to unit vectors")
    axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path)
