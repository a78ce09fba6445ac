import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.report.curve import Axis, Series, draw, label, linear_ticks, log_ticks, thin

LABELS = {"x_label": "step", "y_label": "loss (nats per token)"}


def falling(steps):
    return [(step, 3 + 8 / (1 + step / 10)) for step in range(steps)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4768, [0, 1000, 2000, 3000, 4000]),
        (3.28, 3.52, [3.3, 3.35, 3.4, 3.45, 3.5]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 6, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_linear_ticks_are_round_and_within_the_range(low, high, expected):
    assert linear_ticks(low, high) == expected


@settings(derandomize=True, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_evenly_spaced_and_within_any_range(low, span):
    ticks = linear_ticks(low, low + span)
    gaps = [(after - before) / span for before, after in itertools.pairwise(ticks)]
    assert 2 <= len(ticks) <= 8
    assert max(gaps) - min(gaps) < 1e-6
    assert low - 1e-6 * span <= ticks[0] <= ticks[-1] <= low + span * (1 + 1e-6)


def test_log_ticks_thin_out_over_many_decades():
    assert log_ticks(1, 200) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert log_ticks(1, 1e6) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]


def test_tick_numbers_are_short():
    numbers = (4000.0, 50_000, 2.5e6, 1e9, 0.30000000000000004, 3.25)
    assert [label(number) for number in numbers] == ["4,000", "50k", "2.5M", "1B", "0.3", "3.25"]


def test_an_axis_maps_its_ends_and_middle():
    linear, log = Axis(0, 10, 100, 200), Axis(1, 100, 100, 200, log=True)
    assert [linear.place(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert [log.place(value) for value in (1, 10, 100)] == pytest.approx([100, 150, 200])


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 500])
def test_a_drawing_of_any_length_is_well_formed_with_axis_labels(steps, log_x):
    drawn = draw([Series("train", falling(steps))], log_x=log_x, target=3.3, **LABELS)
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("text")]
    assert "step" in texts
    assert "loss (nats per token)" in texts
    assert "nan" not in drawn


def test_without_points_a_sentence_stands_in():
    assert "Nothing has been logged" in draw([Series("train", [])], **LABELS)
    assert "Nothing has been logged" in draw([Series("train", [(0, math.nan)])], **LABELS)


def test_a_loss_that_is_not_finite_leaves_a_gap():
    points = [(0, 5.0), (1, 4.0), (2, math.nan), (3, math.inf), (4, 3.0), (5, 2.0)]
    path = re.search(r'<path class="c0 line" d="([^"]+)"', draw([Series("train", points)], **LABELS))[1]
    assert (path.count("M"), path.count("L")) == (2, 2)


def carried(drawn):
    return json.loads(ElementTree.fromstring(drawn).get("data-chart"))


def test_the_drawing_carries_what_the_page_draws_again():
    lines = [
        Series("train", [(0, 1.23456789), (1, math.nan)], run="r0", look="faint"),
        Series("validation", [(2, 5.125)], run="r0", colour=9, look="dots"),
    ]
    assert carried(draw(lines, log_x=False, target=3.3, **LABELS)) == {
        "x": "step", "y": "loss (nats per token)", "logX": False, "zero": False, "target": 3.3,
        "lines": [["train", "r0", "c0 faint", [[0, 1.23457], [1, None]]],
                  ["validation", "r0", "c1 dots dashed", [[2, 5.125]]]],
    }  # fmt: skip


def test_faint_lines_lie_behind_the_others():
    lines = [Series("b", falling(3), look="dots"), Series("a", falling(3), look="faint")]
    assert [line[0] for line in carried(draw(lines, **LABELS))["lines"]] == ["a", "b"]


def test_a_drawing_from_zero_begins_at_zero():
    texts = [element.text for element in ElementTree.fromstring(
        draw([Series("speed", [(0, 505.0), (9, 506.0)])], from_zero=True, **LABELS)
    ).iter("text")]  # fmt: skip
    assert "0" in texts
    assert "500" in texts


def test_a_handful_of_points_is_drawn_whole():
    path = re.search(r' d="M[\d.]+,([\d.]+)', draw([Series("race", [(60, 4.0), (80, 3.0)])], **LABELS))
    assert float(path[1]) > 16


def test_names_cannot_break_out_of_the_drawing():
    drawn = draw([Series("<script>'\"", falling(3))], x_label="a<b", y_label="c\"d'")
    assert "<script>" not in drawn
    assert carried(drawn)["lines"][0][0] == "<script>'\""


@pytest.mark.parametrize("most", [16, 200, 1000])
def test_thinning_keeps_the_ends_and_the_extremes_and_bounds_the_size(most):
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[50_001] = (50_001, 99.0)
    kept = thin(points, most)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (50_001, 99.0) in kept
    assert len(kept) <= most
    assert kept == sorted(kept)


def test_thinning_keeps_the_beginning_for_a_logarithmic_axis():
    kept = thin([(step, 1 / step) for step in range(1, 100_001)], 400)
    assert sum(x <= 100 for x, _ in kept) >= 20


def test_few_points_are_not_thinned():
    assert thin(falling(100), 100) == falling(100)
