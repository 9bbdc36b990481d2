"""Pictures of similarities. Needs the `plot` extra."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact import atomic_file
from onnxsim_embed.errors import MissingExtraError

LABEL_CHARACTERS = 28
LABELLED_ROWS = 60  # beyond, labels of a readable size would overlap
VALUED_ROWS = 16  # beyond, numbers do not fit into cells


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
    :param labels: n texts, shortened to fit; left out where they would overlap.
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
    if order and n > 2:
        scores, labels = _side_by_side(scores, labels)
    side = float(np.clip(0.42 * n, 4.2, 11))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min(0.0, float(np.floor(scores.min() * 10) / 10))
    image = axes.imshow(scores, cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    if labels is not None and n <= LABELLED_ROWS:
        short = [_shorten(label) for label in labels]
        size = 9 if n <= 30 else 6.5
        axes.set_xticks(
            range(n),
            short,
            rotation=45,
            ha="right",
            rotation_mode="anchor",
            fontsize=size,
            parse_math=False,
        )
        axes.set_yticks(range(n), short, fontsize=size, parse_math=False)
    else:
        axes.set_xlabel("rows, similar ones side by side" if order else "row")
        axes.set_ylabel(axes.get_xlabel())
    if n <= VALUED_ROWS:
        for (row, column), value in np.ndenumerate(scores):
            dark = value < low + 0.6 * (1 - low)
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    if title:
        axes.set_title(_one_line(title), fontsize=11, parse_math=False)
    kind = check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work, warnings.catch_warnings():
        # A box stands where the font has no glyph; the user can do nothing about it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure.savefig(work, format=kind)


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
    scores: npt.NDArray[np.float32], labels: Sequence[str] | None
) -> tuple[npt.NDArray[np.float32], Sequence[str] | None]:
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = np.clip(1 - scores.astype(np.float64), 0, 2)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    leaves = leaves_list(linkage(squareform(distances), "average"))
    names = None if labels is None else [labels[int(leaf)] for leaf in leaves]
    return scores[np.ix_(leaves, leaves)], names


def _one_line(label: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(label.split()))


def _shorten(label: str) -> str:
    text = _one_line(label)
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
