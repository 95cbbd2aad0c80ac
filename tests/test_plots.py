"""What a figure shows, against the data it was drawn from."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from chanpatch import ThresholdProbe
from chanpatch.errors import MissingPackageError, StatisticsError
from chanpatch.patching import ActivationCache
from chanpatch.plots import channel_map, contingency, effect_ranking, heat_map, strip, survival
from chanpatch.statistics import PairedCounts

SUMS = np.array([3.0, 9.0, 2.0, 8.0, 7.5, 1.0])
LABELS = np.array(["LEFT", "UP", "LEFT", "UP", "UP", "LEFT"])
SPLIT = np.array(["in", "in", "out", "out", "in", "in"])


def record(label: str, effect: float, **more: Any) -> dict[str, Any]:
    return {"label": label, "effect": effect, "low": effect - 0.1, "high": effect + 0.3, **more}


@pytest.fixture(autouse=True)
def settings_and_figures() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before  # no test here may change them, and no figure does
    pyplot.close("all")


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_a_strip_has_every_sum_in_the_column_of_its_label() -> None:
    ax = strip(SUMS, LABELS)
    (marks,) = ax.collections
    at = np.asarray(marks.get_offsets())
    assert sorted(at[:, 1]) == sorted(SUMS)
    for column, label in enumerate(("LEFT", "UP")):
        assert sorted(at[np.round(at[:, 0]) == column, 1]) == sorted(SUMS[np.equal(LABELS, label)])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["LEFT\nn = 3", "UP\nn = 3"]
    assert ax.get_legend() is None


def test_the_parts_of_a_split_stand_side_by_side_with_marks_of_their_own() -> None:
    ax = strip(SUMS, LABELS, SPLIT, threshold=5.0)
    inside, outside = (np.asarray(marks.get_offsets()) for marks in ax.collections)
    assert sorted(inside[:, 1]) == [1.0, 3.0, 7.5, 9.0] and sorted(outside[:, 1]) == [2.0, 8.0]
    assert (np.floor(inside[:, 0] + 0.5) > inside[:, 0]).all() and (np.floor(outside[:, 0] + 0.5) < outside[:, 0]).all()
    shapes = [marks.get_paths()[0].vertices.shape for marks in ax.collections]
    assert shapes[0] != shapes[1]
    assert list(ax.lines[0].get_ydata()) == [5.0, 5.0] and ax.lines[0].get_linestyle() == "--"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["in (n = 4)", "out (n = 2)", "threshold 5"]


def test_labels_of_several_types_and_with_dollar_signs_are_columns_of_their_own() -> None:
    ax = strip(SUMS, np.array([None, "$UP$", None, "$UP$", 3, 3], object))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["$UP$\nn = 2", "3\nn = 2", "None\nn = 2"]
    assert not any(text.get_parse_math() for text in ax.get_xticklabels())
    with pytest.raises(StatisticsError) as error:
        strip(np.arange(41.0), np.arange(41))
    assert str(error.value) == "labels must contain at most 40 different labels; got 41."


def test_infinity_is_marked_as_a_missing_value() -> None:
    ax = heat_map([[1.0, -math.inf], [math.inf, 0.5]], ["a", "b"], ["c", "d"])
    assert marks(ax, "0.5") == [[1, 0], [0, 1]] and not marks(ax, "white")


def test_an_effect_is_a_dot_at_its_value_on_a_line_over_its_interval() -> None:
    ax = effect_ranking([record("a", 0.2), record("b", -0.5), record("c", 0.3)], label="difference, n = 30 levels")
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [-0.5, 0.3, 0.2]
    intervals = [lines.get_segments()[0] for lines in ax.collections]
    assert [segment[:, 0].tolist() for segment in intervals] == [
        pytest.approx([effect - 0.1, effect + 0.3]) for effect in (-0.5, 0.3, 0.2)
    ]
    assert [segment[0, 1] for segment in intervals] == [0, 1, 2]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "c", "a"]
    assert ax.yaxis_inverted()
    assert [line.get_xdata() for line in ax.lines if line.get_linestyle() == ":"] == [[0, 0]]
    assert ax.get_xlabel() == "difference, n = 30 levels"
    assert not texts(ax)


def test_the_twenty_largest_effects_are_shown_and_the_hidden_ones_counted() -> None:
    ax = effect_ranking([record(str(number), number / 100) for number in range(25)] + [record("nan", math.nan)])
    assert [text.get_text() for text in ax.get_yticklabels()] == [str(number) for number in range(24, 4, -1)]
    assert ax.get_title(loc="left") == "20 of 26 effects, 6 hidden; lines: 95% intervals"


def test_controls_stand_below_the_effects_as_squares() -> None:
    ax = effect_ranking([record("control", 0.9, control=True), record("effect", 0.1, control=False)])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["effect", "control"]
    (dot,), (square,) = ([line for line in ax.lines if line.get_marker() == marker] for marker in ("o", "s"))
    assert square.get_ydata()[0] - dot.get_ydata()[0] == 2  # one place is left free
    assert square.get_markerfacecolor() == "white"
    assert ax.get_title(loc="left") == "1 effect; 1 control; lines: 95% intervals"


def test_p_values_are_written_beside_the_effects_that_have_one() -> None:
    ax = effect_ranking([record("a", 0.4, p=0.031), record("b", 0.3, p=None), record("c", 0.2, p=math.nan)])
    assert texts(ax) == ["0.031", "p"]
    assert ax.texts[0].get_position()[1] == 0
    assert texts(effect_ranking([record("a", 0.4, p=1e-4)])) == ["<0.001", "p"]


def test_an_effect_without_an_interval_or_a_label_is_drawn_with_its_site() -> None:
    bare = {"site": "Site('conv1', channel=3)", "effect": 0.4, "low": None, "high": math.nan}
    ax = effect_ranking([bare])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["Site('conv1', channel=3)"]
    assert float(ax.lines[0].get_xdata()[0]) == 0.4
    assert not ax.collections and ax.get_title(loc="left") == "1 effect"


def test_a_withheld_interval_has_no_bar_and_intervals_of_few_inputs_are_marked() -> None:
    withheld = {**record("b", 0.3), "low": math.nan, "high": math.nan, "note": "5 rows"}
    shown = [record("a", 0.5, note="few"), withheld]
    ax = effect_ranking(shown)
    assert len(ax.collections) == 1
    assert ax.get_title(loc="left") == "2 effects; lines: 95% intervals (few inputs)"


def marks(ax: Axes, color: str) -> list[list[float]]:
    rgba = matplotlib.colors.to_rgba(color)
    return [point for each in ax.collections if tuple(each.get_edgecolor()[0]) == rgba
            for point in np.asarray(each.get_offsets()).tolist()]  # fmt: skip


def test_a_heat_map_has_its_values_in_cells_and_marks_negative_and_missing_ones() -> None:
    values = [[1.0, -0.05, -0.5], [math.nan, -0.9, 0.2]]
    ax = heat_map(values, ["layer 0", "layer 1"], ["The", "$cat$", "a\nb"], label="mean change")
    np.testing.assert_array_equal(ax.images[0].get_array(), values)
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (-1.0, 1.0)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["The", "$cat$", "a\\nb"]
    assert not any(text.get_parse_math() for text in ax.get_xticklabels())
    assert marks(ax, "black") == [[2, 0]] and marks(ax, "white") == [[1, 1]] and marks(ax, "0.5") == [[0, 1]]
    assert ax.get_title(loc="left") == "dashes: negative\ncrosses: no finite value"
    assert ax.figure.axes[1].get_ylabel() == "mean change"


def test_a_heat_map_without_negative_values_starts_at_zero_and_thins_out_its_labels() -> None:
    ax = heat_map(np.ones((2, 100)), range(2), range(100))
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0.0, 1.0) and ax.get_title(loc="left") == ""
    assert [text.get_text() for text in ax.get_xticklabels()] == [str(each) for each in range(0, 100, 3)]


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (12, 15)])
def test_no_text_of_a_heat_map_is_cut_off(shape: tuple[int, int]) -> None:
    values = np.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)
    values[0, 0] = math.nan
    ax = heat_map(values, range(shape[0]), ["token"] * shape[1], label="mean change (logit_difference, 16 inputs)")
    ax.figure.canvas.draw()
    width, height = ax.figure.canvas.get_width_height()
    for text in (ax.figure.axes[1].yaxis.label, ax.title, ax._left_title):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_a_heat_map_in_gray_is_the_darker_the_larger_the_effect_of_either_sign() -> None:
    for sign in (1, -1):
        shown = heat_map([[sign * value for value in np.linspace(0, 1, 9)] + [-sign]], ["a"], range(10)).images[0]
        gray = (shown.cmap(shown.norm(shown.get_array()))[0, :, :3] @ [0.299, 0.587, 0.114])[:9]
        assert (np.diff(gray) < 0).all()


def test_a_survival_curve_falls_at_every_value_and_policies_have_line_styles_of_their_own() -> None:
    values = {str(number): np.arange(1.0, 5.0) + number for number in range(6)}
    ax = survival(values, label="episode length (steps)")
    assert ax.lines[1].get_xdata().tolist() == [2, 3, 4, 5, 5] and ax.lines[1].get_drawstyle() == "steps-pre"
    assert ax.lines[1].get_ydata().tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert len({(line.get_linestyle(), line.get_color()) for line in ax.lines}) == 6
    assert [text.get_text() for text in ax.get_legend().get_texts()][0] == "0 (n = 4)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("episode length (steps)", "fraction of episodes above")


def test_the_cells_of_a_mosaic_have_the_shares_of_the_pairs_as_their_areas() -> None:
    counts = PairedCounts(both=60, only_first=40, only_second=36, neither=64)
    ax = contingency(counts, names=("patched", "original"))
    areas = [bar.get_width() * bar.get_height() * 200 for bar in ax.patches]
    assert areas == pytest.approx(list(counts))
    assert [bar.get_x() for bar in ax.patches] == [0, 0, 0.5, 0.5]
    assert [bar.get_y() for bar in ax.patches] == pytest.approx([0, 0.6, 0, 0.36])
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True, True, False]
    assert texts(ax) == [
        "both\n60 (30.0%)",
        "only patched\n40 (20.0%)",
        "only original\n36 (18.0%)",
        "neither\n64 (32.0%)",
    ]
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "patched succeeded\n100 of 200 pairs",
        "patched failed\n100 of 200 pairs",
    ]
    assert "n = 200 pairs" in ax.get_xlabel()


@pytest.mark.parametrize("counts", [(0, 0, 3, 197), (200, 0, 0, 0), (1, 1, 197, 1), (0, 5, 0, 0)])
def test_no_two_texts_of_a_mosaic_overlap_however_small_its_cells(counts: tuple[int, int, int, int]) -> None:
    ax = contingency(PairedCounts(*counts))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 4
    assert not [1 for number, box in enumerate(boxes) for other in boxes[:number] if box.overlaps(other)]


def test_a_map_lies_over_the_pixels_that_its_cells_stand_for() -> None:
    observation, activation = torch.rand(3, 6, 9), torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 8.0]])
    ax = channel_map(observation, activation)
    below, above = ax.images
    np.testing.assert_allclose(below.get_array(), observation.mean(0))
    np.testing.assert_array_equal(above.get_array(), activation.repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert (above.norm.vmin, above.norm.vmax) == (0.0, 8.0)
    np.testing.assert_allclose(above.get_alpha(), 0.75 * above.get_array() / 8.0)
    assert ax.get_title() == "solid line: above 4"
    (outline,) = (path for lines in ax.collections for path in lines.get_paths())
    assert outline.vertices.min(0) == pytest.approx([5.5, 2.5]) and outline.vertices.max(0) == pytest.approx([8.5, 5.5])
    assert ax.figure.axes[1].get_ylabel() == "activation (no unit), 2 x 3 cells"


def test_negative_activations_are_surrounded_by_dashes() -> None:
    ax = channel_map(torch.zeros(1, 4, 4, dtype=torch.uint8), torch.tensor([[2.0, 0.0], [0.0, -2.0]]))
    assert ax.get_title() == "solid line: above 1; dashed line: below -1"
    assert ax.images[1].norm.vmin == -2.0
    solid, dashed = (lines.get_linestyle()[0][1] for lines in ax.collections)
    assert solid is None and dashed is not None


def test_bytes_are_drawn_as_bright_as_the_fractions_they_stand_for() -> None:
    ax = channel_map(torch.full((3, 4, 4), 51, dtype=torch.uint8), torch.zeros(2, 2))
    np.testing.assert_allclose(ax.images[0].get_array(), 0.2)
    assert ax.get_title() == "zero everywhere"


def test_observations_and_activations_in_half_precision_are_drawn() -> None:
    ax = channel_map(torch.full((3, 4, 4), 0.25, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bfloat16))
    np.testing.assert_array_equal(ax.images[0].get_array(), 0.25)


def test_every_figure_is_drawn_into_the_axes_it_is_given() -> None:
    figure, axes = pyplot.subplots(2, 3)
    drawn = [
        strip(SUMS, LABELS, ax=axes[0, 0]),
        effect_ranking([record("a", 0.2)], ax=axes[0, 1]),
        contingency(PairedCounts(1, 2, 3, 4), ax=axes[1, 0]),
        channel_map(torch.zeros(3, 4, 4), torch.ones(2, 2), ax=axes[1, 1]),
        heat_map([[1.0]], ["row"], ["col"], axes[0, 2]),
        survival({"original": [1, 2]}, axes[1, 2]),
    ]
    assert drawn == [*axes[:, :2].flat, *axes[:, 2]]
    assert pyplot.get_fignums() == [figure.number]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackageError, match="^matplotlib is not installed: pip install matplotlib$"):
        effect_ranking([record("a", 0.2)])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: strip(SUMS, LABELS[:2]),
            "sums, labels and split must have equal lengths; got shapes (6,), (2,) and (2,).",
        ),
        (
            lambda: strip([1.0, math.inf], ["UP", "UP"]),
            "sums[1] must be finite; got inf. Leave out that input, pair or episode.",
        ),
        (
            lambda: strip(np.zeros(7), np.zeros(7), np.arange(7)),
            "split must contain at most 6 different names; got 7.",
        ),
        (
            lambda: strip(SUMS, LABELS, threshold=ThresholdProbe.fit(SUMS.repeat(2), np.equal(LABELS, "UP").repeat(2))),  # type: ignore[arg-type]
            "threshold must be a number, such as probe.threshold; got ThresholdProbe.",
        ),
        (
            lambda: effect_ranking([record("a", math.nan)]),
            "No effect is finite (number of effects: 1), so there is nothing to plot.",
        ),
        (
            lambda: heat_map([[1.0, 2.0]], ["a"], ["b"]),
            "values must have one row per row label and one column per column label; got shape (1, 2), 1 row labels "
            "and 1 column labels.",
        ),
        (
            lambda: heat_map([[math.nan]], ["a"], ["b"]),
            "No effect is finite (number of effects: 1), so there is nothing to plot.",
        ),
        (lambda: survival({}), "survival() can draw 1 to 6 policies, each in its own line style; got 0."),
        (
            lambda: survival({"a": [1.0, math.inf]}),
            "a[1] must be finite; got inf. Leave out that input, pair or episode.",
        ),
        (
            lambda: contingency(PairedCounts(0, 0, 0, 0)),
            "All four counts are 0, so there are no pairs to plot.",
        ),
        (
            lambda: contingency(PairedCounts(3, -1, 2, 2)),
            "counts must not be negative; got PairedCounts(both=3, only_first=-1, only_second=2, neither=2).",
        ),
        (
            lambda: channel_map(torch.full((3, 4, 4), 255), torch.zeros(2, 2)),
            "observation must be torch.uint8 or floats from 0 to 1; got torch.int64 with values from 255 to 255.",
        ),
        (
            lambda: channel_map(torch.linspace(0, 255, 16).view(1, 4, 4), torch.zeros(2, 2)),
            "observation must be torch.uint8 or floats from 0 to 1; got torch.float32 with values from 0 to 255.",
        ),
        (
            lambda: channel_map(torch.zeros(3, 8, 8), ActivationCache({}, {}, {})),  # type: ignore[arg-type]
            "activation must be a tensor with shape (row, col), such as cache['relu3'][0, 55]; got ActivationCache.",
        ),
        (
            lambda: channel_map(torch.zeros(64, 64, 3), torch.zeros(8, 8)),
            "observation must have shape (channel, row, col) with 1 or 3 channels. activation must be finite, with "
            "shape (row, col) no larger than observation; got shapes (64, 64, 3) and (8, 8).",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(StatisticsError) as caught:
        draw()
    assert str(caught.value) == message
