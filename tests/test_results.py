from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

from chanpatch import HookPoints, ThresholdProbe, contrast, hook_points, patched, sweep, zero_ablate
from chanpatch.contrasts import Contrast
from chanpatch.controls import MatchedChannels, OffDistribution
from chanpatch.errors import StatisticsError
from chanpatch.patching import ActivationCache, Ledger
from chanpatch.policies import PairedRollouts, Rollout, SweptRollouts
from chanpatch.probes import ChannelLabels, LinearProbe, ProbeScores, Transfer
from chanpatch.results import Effects, Records, columns, table
from chanpatch.saving import Contents
from chanpatch.sweeps import Attribution, Grid, SweepResult, attribution


@dataclass(frozen=True, repr=False, eq=False)
class Named(Effects):
    names: tuple[str, ...]
    sizes: np.ndarray
    effect_label: str = "size in meters"
    _by_row = ("names", "sizes")

    def effect(self) -> np.ndarray:
        return self.sizes

    def to_records(self) -> list[dict[str, Any]]:
        return columns(label=self.names, effect=self.sizes)

    def _title(self) -> str:
        return "some <names>"

    def _notes(self) -> list[str]:
        return ["a & b"]


FEW = Named(("a", "b", "c", "<d>"), np.array([0.1, -3.0, np.nan, 2.0]))
MANY = Named(tuple(map(str, range(23))), np.arange(23.0))


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks():
    lines = table([{"channel": 121, "label": "DOWN or LEFT"}, {"channel": 7, "label": "UP"}])
    assert lines == ["channel  label", "121      DOWN or LEFT", "7        UP"]


def test_a_label_with_a_line_break_stays_in_its_line():
    assert table([{"label": "a\nb", "n": 1}]) == ["label  n", r"a\nb   1"]


def test_fractions_have_four_digits_and_none_is_an_empty_cell():
    assert table([{"auc": 0.98765, "n": 12345, "note": None}]) == ["auc     n      note", "0.9877  12345"]


def test_no_records_are_no_lines():
    assert table([]) == []


def test_a_result_prints_its_title_its_largest_effects_the_number_of_others_and_its_notes():
    lines = repr(MANY).splitlines()
    assert lines[:3] == ["some <names>", "label  effect", "22     22"]
    assert lines[-2:] == ["... 3 more", "a & b"] and len(lines) == 24


def test_the_html_table_has_the_same_rows_escaped():
    page = FEW._repr_html_()
    assert page.startswith("<p>some &lt;names&gt;</p><table><thead><tr><th>label</th><th>effect</th></tr></thead>")
    assert "<td>&lt;d&gt;</td>" in page and page.count("<tr>") == 5 and page.endswith("</table><p>a &amp; b</p>")
    assert MANY._repr_html_().count("<tr>") == 21 and "<p>... 3 more</p>" in MANY._repr_html_()
    assert "<tbody></tbody>" in FEW.top(0)._repr_html_()


def test_a_data_frame_has_all_rows():
    assert MANY.to_pandas()["effect"].tolist() == list(range(23))


def test_top_ranks_by_absolute_effect_and_nan_comes_last():
    assert FEW.top(2).names == ("b", "<d>") and FEW.top(2).sizes.tolist() == [-3.0, 2.0]
    assert FEW.top(9).names == ("b", "<d>", "a", "c")
    with pytest.raises(StatisticsError) as caught:
        FEW.top(-1)
    assert str(caught.value) == (
        "The first argument to top() must be the number of rows to return, at least 0; got -1. To choose a metric, "
        "pass metric='name'."
    )


def test_a_result_with_effects_draws_them():
    pyplot.switch_backend("Agg")
    axes = FEW.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "<d>", "a"]
    assert axes.get_xlabel() == "size in meters"
    pyplot.close(axes.figure)


def test_a_progress_bar_appears_in_a_notebook_and_not_in_a_plain_process():
    program = """
import sys, IPython
if sys.argv[1] == "notebook":
    sys.modules["ipykernel.zmqshell"] = IPython  # how tqdm recognizes a notebook
from chanpatch.results import progress_bar
with progress_bar(None, 3, "pass") as advance:
    print(type(advance.__self__).__mro__[1].__name__, advance.__self__.disable)
"""
    for kind, printed in (("notebook", "tqdm_notebook False"), ("process", "tqdm True")):
        run = subprocess.run([sys.executable, "-c", program, kind], capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == printed


@pytest.mark.parametrize(
    "kind",
    [ActivationCache, ChannelLabels, Contents, Grid, HookPoints, Ledger, LinearProbe, MatchedChannels,
     OffDistribution, ProbeScores, Rollout, ThresholdProbe, Transfer],
)  # fmt: skip
def test_every_result_is_a_table(kind: type) -> None:
    assert issubclass(kind, Records) and kind.__repr__ is not object.__repr__


@pytest.mark.parametrize("kind", [Attribution, Contrast, PairedRollouts, SweepResult, SweptRollouts])
def test_every_result_with_effects_ranks_them_by_one_implementation(kind: type) -> None:
    assert issubclass(kind, Effects) and kind._top is Effects._top


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    inputs = torch.randn(16, 3, 8, 8)
    return hook_points(model, inputs), inputs


def test_effects_of_a_sweep_and_of_an_attribution_line_up(linear):
    points, inputs = linear
    options = {"patches": {n: zero_ablate(site) for n, site in enumerate(points.site("1").split("channel"))}}
    options["metric"] = lambda output: output[:, 0]
    swept, estimated = sweep(points, inputs, **options), attribution(points, inputs, **options)
    assert swept.labels == estimated.labels == tuple(range(8))
    assert np.corrcoef(swept.effect(), estimated.effect())[0, 1] > 0.9
    assert swept.top(3).labels == estimated.top(3).labels


def test_effects_of_a_contrast_line_up_with_the_channels(linear):
    points, inputs = linear
    result = contrast(points, inputs, inputs.flip(0) + 1, points.site("1"))
    assert [dict(site.indices)["channel"] for site in result.sites] == [(channel,) for channel in range(8)]


def test_a_ledger_prints_its_patches_and_no_method_for_the_forward(linear):
    points, inputs = linear
    with patched(points, zero_ablate(points.site("1", channel=2))) as ledger:
        points.model(inputs)
    assert repr(ledger) == (
        "Ledger of 1 patch\n"
        "site                  edit  firings  rows  elements\n"
        "Site('1', channel=2)  Set   1        16    576"
    )
