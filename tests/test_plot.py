"""Heatmaps: any label, any size, no global state, one line if matplotlib is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from onnxsim_embed import plot
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.plot import heatmap


def scores_of(n, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors @ vectors.T).astype(np.float32)


def drawn(scores, **options):
    """Return what a picture shows: the scores, the labels of the rows, the range of its colors."""
    picture = heatmap(scores, **options).axes[0]
    labels = [label.get_text() for label in picture.get_yticklabels()]
    return np.asarray(picture.images[0].get_array()), labels, picture.images[0].get_clim()


@pytest.mark.parametrize(
    ("name", "head"),
    [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG"), ("a", b"\x89PNG")],
)
def test_the_extension_selects_the_format(tmp_path, name, head):
    heatmap(scores_of(4), tmp_path / name, labels=list("abcd"), title="four texts")
    assert (tmp_path / name).read_bytes().startswith(head)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("n", "order"), [(1, True), (2, True), (61, True), (200, False)])
def test_any_number_of_rows_is_drawn(tmp_path, n, order):
    labels = [f"text {i}" for i in range(n)]
    heatmap(scores_of(n), tmp_path / "map.png", labels=labels, order=order)
    assert (tmp_path / "map.png").stat().st_size > 2000


LABELS = {
    "formulas": ["costs $5 or $6", "$", "a $x^2_{", "a_b^c \\frac{1}", "\\$", "%d {} &<>"],
    "spaces": ["two\nlines\tand a tab", "", "\u2028", "word " * 30],
    "glyphs": ["naïve café", "漢字", "🙂", "\x07 bell", "עברית"],  # the font lacks some of them
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("extension", ["png", "svg"])
def test_any_label_and_title_is_drawn_without_a_warning(tmp_path, labels, extension):
    path = tmp_path / f"map.{extension}"
    heatmap(scores_of(len(labels)), path, labels=labels, title=labels[2])


def test_order_puts_groups_next_to_each_other_and_loses_no_score():
    groups = np.array([0, 1, 0, 1, 0, 1])
    scores = np.where(groups[:, None] == groups, 0.9, 0.1) + 0.01 * scores_of(6)
    scores = ((scores + scores.T) / 2).astype(np.float32)
    np.fill_diagonal(scores, 1)
    labels = [f"group {group}" for group in groups]
    shown, names, _ = drawn(scores, labels=labels, order=True)
    assert names in (sorted(labels), sorted(labels, reverse=True))
    np.testing.assert_array_equal(np.sort(shown, axis=None), np.sort(scores, axis=None))
    np.testing.assert_array_equal(shown, shown.T)
    assert (shown[:3, :3] > 0.5).all()


def test_labels_in_the_order_of_rows_are_shortened_and_of_many_some_are_shown():
    labels = ["漢" * 14, "漢" * 15, "x" * 28, "rural school " * 9]
    shown, names, _ = drawn(scores_of(4), labels=labels)
    np.testing.assert_array_equal(shown, scores_of(4))
    assert names[:3] == ["漢" * 14, "漢" * 13 + "…", "x" * 28]
    assert len(names[3]) <= 28
    _, names, _ = drawn(scores_of(200), labels=[f"text {row}" for row in range(200)])
    assert names == [f"text {row}" for row in range(0, 200, 4)]


def test_without_labels_rows_are_numbered_also_if_reordered():
    scores = scores_of(20)
    shown, names, _ = drawn(scores, order=True)
    rows = list(map(int, names))
    assert sorted(rows) == list(range(20)) != rows
    np.testing.assert_array_equal(shown, scores[np.ix_(rows, rows)])


@pytest.mark.parametrize(
    ("n", "low", "high", "colors"),
    [
        (5, 0.63, 0.82, (0.6, 1.0)),  # few rows: up to 1, with the values in the cells
        (5, -0.04, 0.3, (-0.1, 1.0)),
        (40, 0.11, 0.48, (0.1, 0.5)),  # many: all colors are for different rows
        (40, 0.5, 0.5, (0.4, 0.5)),
        (2, 1.0, 1.0, (0.9, 1.0)),
        (1, 1.0, 1.0, (0.0, 1.0)),
    ],
)
def test_colors_are_for_the_scores_of_different_rows(n, low, high, colors):
    scores = np.linspace(low, high, n * n, dtype=np.float32).reshape(n, n)
    np.fill_diagonal(scores, 1)
    assert drawn(scores)[2] == pytest.approx(colors)


def test_cells_of_small_sets_hold_values_without_a_minus_zero(tmp_path):
    scores = np.array([[1, -0.001], [-0.001, 1]], np.float32)
    heatmap(scores, tmp_path / "map.svg", labels=["a", "b"])
    assert (tmp_path / "map.svg").read_text(encoding="utf-8").count("<!-- 0.00 -->") == 2
    heatmap(scores_of(17), tmp_path / "many.svg")
    assert "<!-- 1.00 -->" not in (tmp_path / "many.svg").read_text(encoding="utf-8")


def test_installed_fonts_fill_the_gaps_of_matplotlibs_own(monkeypatch):
    monkeypatch.setattr(plot, "FALLBACK_FONTS", ("No Such Font", "DejaVu Serif"))
    assert plot._fonts.__wrapped__() == ["DejaVu Sans", "DejaVu Serif"]


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((2, 3), None), ((3,), None), ((0, 0), None), ((2, 2), ["one"]), ((2, 2), [])],
)
def test_shapes_that_do_not_match_and_unknown_formats_are_rejected(tmp_path, shape, labels):
    with pytest.raises(ValueError, match="square"):
        heatmap(np.ones(shape, np.float32), tmp_path / "map.png", labels=labels)
    with pytest.raises(ValueError, match=r"map\.xyz: .*png"):
        heatmap(scores_of(2), tmp_path / "map.xyz")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[plot\]'") as caught:
        heatmap(scores_of(2), tmp_path / "map.png")
    assert "\n" not in str(caught.value)


def test_the_figure_is_returned(tmp_path):
    figure = heatmap(scores_of(5).tolist(), title="five")
    picture, colors = figure.axes
    assert (picture.get_title(), colors.get_ylabel()) == ("five", "cosine similarity")
    assert len(picture.texts) == 25
    assert isinstance(heatmap(scores_of(5), tmp_path / "map.png"), Figure)


def test_given_axes_are_drawn_in_without_pyplot_which_needs_a_display(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert heatmap(scores_of(3), ax=right) is figure
    assert (len(left.images), len(right.images)) == (0, 1)
    heatmap(scores_of(3), tmp_path / "both.png", ax=left)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
