"""Labels of points do not cover each other."""

from __future__ import annotations

from lab.pictures import nice_ticks, place_labels

EDGES = (0.0, 400.0)


def test_a_lone_label_stands_at_the_right():
    assert place_labels([(100.0, 50.0)], [80.0], EDGES) == [(9.0, 0.0)]


def test_labels_stay_inside_the_axes():
    assert place_labels([(390.0, 50.0)], [80.0], EDGES) == [(-89.0, 0.0)]


def test_neighbours_move_apart():
    spots, widths = [(100.0 + 12 * i, 50.0) for i in range(5)], [90.0] * 5
    shifts = place_labels(spots, widths, EDGES)
    boxes = [
        (x + across, x + across + 90, y + up)
        for (x, y), (across, up) in zip(spots, shifts, strict=True)
    ]
    for one in range(5):
        for other in range(one):
            apart = boxes[one][1] <= boxes[other][0] or boxes[other][1] <= boxes[one][0]
            assert apart or abs(boxes[one][2] - boxes[other][2]) >= 10


def test_a_crowd_still_gets_labels():
    assert len(place_labels([(100.0, 50.0)] * 40, [90.0] * 40, EDGES)) == 40


def test_ticks():
    assert nice_ticks(25, 160) == [30, 50, 70, 100, 150]
