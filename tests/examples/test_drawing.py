"""Panels of figures."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from maze.analysis.drawing import Panel, chart, draw

ROWS = [
    {"kind": kind, "size": size, "n": 9, "x": size / 10, "x_low": size / 10 - 0.1, "x_high": size / 10 + 0.1, "y": None}
    for kind in ("zero", "mean")
    for size in (1, 2)
]


def drawn(panel, rows=ROWS):
    axes = Figure().subplots()
    draw(axes, {"effects": rows}, panel)
    return axes


def test_a_panel_has_a_line_per_category_from_the_top_and_a_mark_per_series():
    axes = drawn(Panel("effects", "size", "x", "effect", "kind", scale=100))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["zero", "mean"]
    marks = axes.lines[0].get_xydata()
    np.testing.assert_allclose(marks[:, 0], [10, 20])
    assert marks[0, 1] > marks[1, 1] and axes.get_xlabel() == "effect, 95% interval, n=9"


def test_counts_that_differ_stand_with_their_categories():
    rows = [row | {"n": 10 * row["size"] + (row["kind"] == "mean")} for row in ROWS]
    axes = drawn(Panel("effects", "size", "x", "effect", names={"1": "one"}), rows)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one\nn=10 to 11", "2\nn=20 to 21"]


def test_along_a_column_of_numbers_the_estimates_are_heights():
    axes = drawn(Panel("effects", "size", "x", "effect", where={"kind": "zero"}, along=True))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.1], [2, 0.2]])
    assert axes.get_legend() is None and axes.get_xlabel() == "size"


def test_several_prefixes_are_series_and_rows_without_an_estimate_are_left_out():
    axes = drawn(Panel("effects", "size", {"one": "x", "other": "y"}, "effect", where={"size": lambda size: size > 1}))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2"] and axes.get_legend() is None


@pytest.mark.parametrize("tables", [{}, {"effects": []}])
def test_a_panel_without_rows_is_empty(tables):
    assert len(chart(Panel("effects", "size", "x", "effect"), Panel("effects", "size", "x", "x"))(tables).axes) == 2
