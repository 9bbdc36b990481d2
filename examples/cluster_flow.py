"""Draw examples/cluster.png: how texts and vectors flow on a cluster."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DISK, WORK, STORE = "#e8e4da", "#cfe3f2", "#f6dfb8"

# x, y, width, height, colour, text
BOXES = {
    "texts": (0, 6, 17, 12, DISK, "texts\ncsv, jsonl, parquet\ndisk, s3://"),
    "read": (25, 6, 17, 12, WORK, "tasks read\nparts: 2,048 rows\n0.05 CPU each"),
    "encode": (50, 6, 19, 12, WORK, "actors encode\none model each\n0.9 CPU a thread"),
    "vectors": (79, 6, 19, 12, DISK, "directory of vectors\npart-00000.parquet\nid, vector"),
    "model": (50, 24, 19, 8, STORE, "the model, through\nthe object store"),
    "blocks": (79, -14, 19, 10, STORE, "object store\nblocks of rows,\nonce for each node"),
    "pairs": (50, -14, 19, 10, WORK, "tasks compare\na block with others\n1 CPU each"),
    "graph": (25, -14, 17, 10, DISK, "directory of parts\n(scipy csr)"),
}
ARROWS = [
    ("texts", "read"),
    ("read", "encode"),
    ("encode", "vectors"),
    ("model", "encode"),
    ("vectors", "blocks"),
    ("blocks", "pairs"),
    ("pairs", "graph"),
]


def main() -> None:
    """Draw the picture."""
    figure, axes = plt.subplots(figsize=(9.6, 4.8), dpi=150)
    for x, y, width, height, colour, text in BOXES.values():
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.6", fc=colour, ec="#555555")
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)
    for first, last in ARROWS:
        start, end = ends(BOXES[first][:4], BOXES[last][:4])
        arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="#333333")
        axes.add_patch(arrow)
    axes.text(0, 27, "encode --engine ray", fontsize=11, weight="bold")
    axes.text(0, -10, "similarity\n--engine ray", fontsize=11, weight="bold", va="center")
    axes.set_xlim(-2, 101)
    axes.set_ylim(-17, 35)
    axes.axis("off")
    figure.savefig(Path(__file__).parent / "cluster.png", bbox_inches="tight")


def ends(
    one: tuple[float, ...], other: tuple[float, ...]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return where an arrow between two boxes starts and ends: side to side, or top to bottom."""
    (x, y, width, height), (a, b, wide, high) = one, other
    if x == a:
        return ((x + width / 2, y - 0.8), (a + wide / 2, b + high + 0.8))
    if x < a:
        return ((x + width + 0.8, y + height / 2), (a - 0.8, b + high / 2))
    return ((x - 0.8, y + height / 2), (a + wide + 0.8, b + high / 2))


if __name__ == "__main__":
    main()
