"""Pictures of similarities. Needs the `plot` extra."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import check_packages
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.uris import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_COLUMNS = 28  # of a terminal: a Chinese, Japanese or Korean character takes two
LABELLED_ROWS = 60  # beyond, labels of a readable size would overlap, and only some rows have one
VALUED_ROWS = 16  # beyond, numbers do not fit into cells

# Fonts of common systems for scripts that matplotlib's own font lacks; installed ones fill its gaps.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali",
    "Noto Sans Ethiopic", "Noto Sans Thai", "Nirmala UI", "Arial Unicode MS", "Noto Emoji",
    "Segoe UI Symbol",
)  # fmt: skip


def heatmap(
    scores: npt.ArrayLike,
    path: str | Path | None = None,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    order: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Draw a square matrix of similarities.

    :param scores: float array (n, n).
    :param path: picture file; its extension selects the format (png, svg, pdf). None writes none: a
        notebook shows the result.
    :param labels: n texts, shortened to fit, and only some of them if all would overlap; None: row
        numbers.
    :param title: a line above the picture.
    :param order: put similar rows next to each other (average linkage of 1 - score), so that groups show.
    :param ax: matplotlib axes to draw in; None makes a figure of a size that fits.
    :returns: the matplotlib figure.
    :raises MissingExtraError: if matplotlib is not installed.
    :raises ValueError: if the shapes do not match or the picture format is unknown.
    """
    require_matplotlib()
    # The object interface: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = np.asarray(scores)
    file_format = None if path is None else check_format(local_path(path))
    n = len(scores) if scores.ndim else 0
    if scores.shape != (n, n) or n == 0 or (labels is not None and len(labels) != n):
        raise ValueError(
            f"a heatmap needs a square matrix and one label per row, got {scores.shape} and "
            f"{'no' if labels is None else len(labels)} labels"
        )
    names = [str(row) for row in range(n)] if labels is None else list(labels)
    if order and n > 2:
        leaves = _cluster_order(scores)
        scores, names = scores[np.ix_(leaves, leaves)], [names[leaf] for leaf in leaves]
    side = float(np.clip(0.42 * n, 4.2, 11))
    figure: Any = None if ax is None else ax.figure
    if ax is None:
        figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    low, high, extend = _color_range(scores)
    image = ax.imshow(scores, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=ax, shrink=0.8, label="cosine similarity", extend=extend)
    size = min(9.0, 36 * side / n) if n <= LABELLED_ROWS else 6.5
    text: dict[str, Any] = {"fontsize": size, "parse_math": False, "fontfamily": _fonts()}
    step = -(-n // LABELLED_ROWS)
    shown = [_fit_label(name) for name in names[::step]]
    ax.set_yticks(range(0, n, step), shown, **text)
    if step == 1:
        ax.set_xticks(range(n), shown, rotation=45, ha="right", rotation_mode="anchor", **text)
    else:
        ax.set_xticks([])
        ordered = ", similar ones next to each other" if order else ""
        ax.set_xlabel(f"{n:,} rows{ordered}; one in {step} is labelled")
    if n <= VALUED_ROWS:
        for (row, column), value in np.ndenumerate(scores):
            cell = f"{round(float(value), 2) + 0.0:.2f}"  # no minus before a zero
            color = "white" if value < low + 0.6 * (high - low) else "black"
            ax.text(column, row, cell, ha="center", va="center", fontsize=8, color=color)
    if title:
        ax.set_title(one_line(title), fontsize=11, parse_math=False, fontfamily=_fonts())
    if path is None:
        return figure
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work, warnings.catch_warnings():
        # A glyph that no font has is drawn as a box; the user can do nothing about it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure.savefig(work, format=file_format, bbox_inches="tight")
    return figure


def _color_range(scores: npt.NDArray[np.float32]) -> tuple[float, float, str]:
    """Return the scores of the first and last color, and on which sides scores lie beyond them.

    The diagonal would take most colors and says nothing; of many scores, so would the outermost few.
    """
    others = scores[~np.eye(len(scores), dtype=bool)]
    if not len(others):
        return 0.0, 1.0, "neither"
    few = len(scores) <= VALUED_ROWS
    low, high = np.quantile(others, (0, 1) if few else (0.002, 0.998))
    low, high = np.floor(low * 10) / 10, 1.0 if few else np.ceil(high * 10) / 10
    if high - low < 0.1:  # all scores are equal
        low = high - 0.1
    below, beyond = others.min() < low - 1e-6, scores.max() > high + 1e-6
    extend = "both" if below and beyond else "min" if below else "max" if beyond else "neither"
    return float(low), float(high), extend


@cache
def _fonts() -> list[str]:
    """Return matplotlib's own font and the installed ones among FALLBACK_FONTS."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


def require_matplotlib() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    check_packages("drawing a heatmap", "plot", {"matplotlib": "matplotlib"})


def check_format(path: Path) -> str:
    """Return the picture format of a file's extension; raise ValueError if it is unknown."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file_format = path.suffix.lstrip(".").lower() or "png"
    known = FigureCanvasAgg.get_supported_filetypes()
    if file_format not in known:
        raise ValueError(f"{path}: pictures can be {', '.join(sorted(known))}")
    return file_format


def _cluster_order(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = np.clip(1 - scores.astype(np.float64), 0, 2)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    return np.asarray(leaves_list(linkage(squareform(distances), "average")), np.int64)


def printable(text: str) -> str:
    """Return a text without control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def one_line(text: str) -> str:
    """Return a text as one line of printable characters."""
    return printable(" ".join(text.split()))


def _fit_label(label: str) -> str:
    text = one_line(label)
    ends = np.cumsum([1 + (east_asian_width(character) in "WF") for character in text])
    if not len(ends) or ends[-1] <= LABEL_COLUMNS:
        return text
    return text[: int(np.searchsorted(ends, LABEL_COLUMNS - 1, "right"))] + "…"
