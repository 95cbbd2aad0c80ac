import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from chanpatch import contrast, hook_points
from maze.analysis.contrasts import contrast_rows, draw_contrast


@pytest.fixture
def pairs():
    """A model, and inputs of which the first channel tells clean from corrupted."""
    torch.manual_seed(0)
    points = hook_points(torch.nn.Conv2d(2, 3, 1), torch.zeros(2, 2, 2, 2))
    corrupted = torch.randn(8, 2, 2, 2)
    clean = corrupted + torch.rand(8, 2, 1, 1)
    return points, clean, corrupted, torch.randn(20, 2, 2, 2)


def test_the_interval_of_a_difference_is_what_it_is_without_a_background(pairs):
    points, clean, corrupted, background = pairs
    rows = {
        row["site"]: row for row in contrast_rows(contrast(points, clean, corrupted, ".out", background=background))
    }
    for record in contrast(points, clean, corrupted, ".out").to_records():
        row = rows[record["site"]]
        measured = [row["difference"], row["difference_low"], row["difference_high"]]
        assert measured == pytest.approx([record["effect"], record["low"], record["high"]])
        assert (row["pairs"], row["background"]) == (8, 20)


def test_a_nearly_silent_channel_has_no_large_effect(pairs):
    points, clean, corrupted, background = pairs
    with torch.no_grad():
        points.model.weight[0] *= 1e-3
        points.model.bias[0] = 0
    result = contrast(points, clean, corrupted, ".out", background=background)
    plain, floored = contrast_rows(result), contrast_rows(result, 0.5)
    least = 0.5 * np.sqrt(np.mean(result.std**2))
    assert result.std[0] < least and abs(plain[0]["effect"]) > 0.1
    for row, same, std in zip(floored, plain, result.std, strict=True):
        assert row["effect"] == pytest.approx(row["difference"] / max(std, least))
        assert (row["difference"], row["p"]) == (same["difference"], same["p"])


def test_the_figure_says_how_many_of_the_channels_it_shows(pairs):
    points, clean, corrupted, background = pairs
    rows = contrast_rows(contrast(points, clean, corrupted, ".out", background=background).top(3))
    axes = Figure().subplots()
    draw_contrast(axes, rows[:2], 3)
    assert axes.get_title("left") == "2 of 3 channels"
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        row["site"].removeprefix("Site(").removesuffix(")").replace("'", "") for row in rows[:2]
    ]
