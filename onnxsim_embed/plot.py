"""Pictures of similarities. Needs the `plot` extra."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_COLUMNS = 28  # of a terminal: a Chinese, Japanese or Korean sign takes two
LABELLED_ROWS = 60  # beyond, labels of a readable size would overlap, and only some rows have one
VALUED_ROWS = 16  # beyond, numbers do not fit into cells

# Fonts of the usual systems for what matplotlib's own lacks. Those that are installed fill its gaps.
MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK TC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Ethiopic",
    "Noto Sans Thai",
    "Nirmala UI",
    "Arial Unicode MS",
    "Noto Emoji",
    "Segoe UI Symbol",
)


def heatmap(
    scores: npt.NDArray[np.float32],
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    order: bool = False,
) -> None:
    """Draw a square of similarities.

    :param scores: float32 array (n, n).
    :param path: picture to write; its ending chooses the format (png, svg, pdf).
    :param labels: n texts, shortened to fit, some of them where all would overlap; None: row numbers.
    :param title: a line above the picture.
    :param order: put similar rows side by side (average linkage of 1 - score), so that groups show.
    :raises MissingExtraError: if matplotlib is not installed.
    :raises ValueError: if the shapes do not fit or the picture format is unknown.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("drawing a heatmap", "plot", "matplotlib")
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path, n = Path(path), len(scores)
    if scores.shape != (n, n) or n == 0 or (labels is not None and len(labels) != n):
        raise ValueError(
            f"a heatmap needs a square and as many labels, got {scores.shape} and "
            f"{'no' if labels is None else len(labels)} labels"
        )
    names = [str(row) for row in range(n)] if labels is None else list(labels)
    if order and n > 2:
        scores, names = _side_by_side(scores, names)
    side = float(np.clip(0.42 * n, 4.2, 11))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high, beyond = _color_range(scores)
    image = axes.imshow(scores, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity", extend=beyond)
    size = min(9.0, 36 * side / n) if n <= LABELLED_ROWS else 6.5
    text: dict[str, Any] = {"fontsize": size, "parse_math": False, "fontfamily": _fonts()}
    step = -(-n // LABELLED_ROWS)
    shown = [_shorten(name) for name in names[::step]]
    axes.set_yticks(range(0, n, step), shown, **text)
    if step == 1:
        axes.set_xticks(range(n), shown, rotation=45, ha="right", rotation_mode="anchor", **text)
    else:
        axes.set_xticks([])
        axes.set_xlabel(
            f"{n:,} rows{', similar ones side by side' if order else ''}; one in {step} is named"
        )
    if n <= VALUED_ROWS:
        _write_values(axes, scores, low + 0.6 * (high - low))
    if title:
        axes.set_title(_one_line(title), fontsize=11, parse_math=False, fontfamily=_fonts())
    kind = check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work, warnings.catch_warnings():
        # A box stands where no font has the glyph; the user can do nothing about it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure.savefig(work, format=kind, bbox_inches="tight")


def _color_range(scores: npt.NDArray[np.float32]) -> tuple[float, float, str]:
    """Return the scores of the first and the last color, and on which sides scores lie beyond.

    The scores of rows with themselves say nothing and would take most colors. Of many scores, a few in
    a thousand lie beyond the colors, for the same reason.
    """
    others = scores[~np.eye(len(scores), dtype=bool)]
    if not len(others):
        return 0.0, 1.0, "neither"
    few = len(scores) <= VALUED_ROWS
    low, high = np.quantile(others, (0, 1) if few else (0.002, 0.998))
    low, high = np.floor(low * 10) / 10, 1.0 if few else np.ceil(high * 10) / 10
    if high - low < 0.1:  # all the same
        low, high = high - 0.1, high
    sides = (others.min() < low - 1e-6, scores.max() > high + 1e-6)
    name = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
    return float(low), float(high), name[int(sides[0]), int(sides[1])]


def _write_values(axes: Axes, scores: npt.NDArray[np.float32], bright: float) -> None:
    """Write each score into its cell, black on the colors of scores from `bright` on."""
    for (row, column), value in np.ndenumerate(scores):
        axes.text(
            column,
            row,
            f"{round(float(value), 2) + 0.0:.2f}",  # no minus before a zero
            ha="center",
            va="center",
            fontsize=8,
            color="white" if value < bright else "black",
        )


@cache
def _fonts() -> list[str]:
    """Return matplotlib's own font and the installed ones among MORE_FONTS."""
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in MORE_FONTS if name in there)]


def check_format(path: Path) -> str:
    """Return the picture format of a file's ending.

    :raises ValueError: if there is none, listing the formats there are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind, known = (
        path.suffix.lstrip(".").lower() or "png",
        FigureCanvasAgg.get_supported_filetypes(),
    )
    if kind not in known:
        raise ValueError(f"{path}: pictures can be {', '.join(sorted(known))}")
    return kind


def _side_by_side(
    scores: npt.NDArray[np.float32], labels: list[str]
) -> tuple[npt.NDArray[np.float32], list[str]]:
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = np.clip(1 - scores.astype(np.float64), 0, 2)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    leaves = leaves_list(linkage(squareform(distances), "average"))
    return scores[np.ix_(leaves, leaves)], [labels[int(leaf)] for leaf in leaves]


def _one_line(label: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(label.split()))


def _shorten(label: str) -> str:
    text = _one_line(label)
    ends = np.cumsum([1 + (east_asian_width(sign) in "WF") for sign in text])
    if not len(ends) or ends[-1] <= LABEL_COLUMNS:
        return text
    return text[: int(np.searchsorted(ends, LABEL_COLUMNS - 1, "right"))] + "…"
