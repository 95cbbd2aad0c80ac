"""HookPoints: a Mapping in execution order that selects, checks sites and prints as a table."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from chanpatch import patched, zero_ablate
from chanpatch.errors import ConcurrencyError, HookPointError, SiteError
from chanpatch.registry import HookPoints, Site, hook_points
from chanpatch.registry.points import bound


@pytest.fixture
def points(plain_cnn) -> HookPoints:
    return hook_points(plain_cnn.module, *plain_cnn.inputs(2))


class Blocks(nn.Module):
    """Names of every kind: nested, numbered, with brackets, called twice, shared."""

    def __init__(self):
        super().__init__()
        self.embedder = nn.ModuleDict(
            {"block1": nn.Linear(6, 6), "block2": nn.Linear(6, 6), "block10": nn.Linear(6, 6)}
        )
        self.relu = nn.ReLU()
        self.tied = self.embedder["block2"]

    def forward(self, vector):
        for block in self.embedder.values():
            vector = self.relu(block(vector))
        return {"[a]": vector, "a": vector + 1}


@pytest.fixture
def blocks() -> HookPoints:
    return hook_points(Blocks(), torch.randn(2, 6))


def test_hook_points_are_a_mapping_from_names(points):
    assert len(points) == len(list(points)) == 12
    assert points["conv1"].name == "conv1"
    assert "conv1" in points
    assert "conv3" not in points
    assert dict(points.items())["relu1"] is points["relu1"]
    assert points.get("conv3") is None


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("embedder.block*", ["embedder.block1", "embedder.block2", "embedder.block10"]),
        ("embedder.block??", ["embedder.block10"]),
        ("embedder.block*0", ["embedder.block10"]),
        ("embedder.block1", ["embedder.block1"]),
        ("relu#?", ["relu#0", "relu#1", "relu#2"]),
        ("**.in[0]", [".in[0]", "embedder.block1.in[0]", "relu#0.in[0]", "embedder.block2.in[0]", "relu#1.in[0]",
                     "embedder.block10.in[0]", "relu#2.in[0]"]),
        ('.out["[a]"]', ['.out["[a]"]']),
        ("tied", ["embedder.block2"]),
    ],
)  # fmt: skip
def test_a_glob_selects_hook_points_in_execution_order(blocks, pattern, names):
    assert list(blocks.select(pattern)) == names


def test_a_selection_keeps_what_the_trace_knows(blocks):
    chosen = blocks.select("relu#*")
    assert (chosen.model, chosen.calls, chosen.method) == (blocks.model, blocks.calls, blocks.method)
    assert chosen.site("relu#1", feature=5).point is blocks["relu#1"]


def test_a_selection_can_be_selected_from(blocks):
    assert list(blocks.select("relu*").select("*#1")) == ["relu#1"]


def test_a_glob_that_matches_nothing_is_refused(blocks):
    with pytest.raises(HookPointError, match=r"No hook point matches 'embeder\*'"):
        blocks.select("embeder*")


def test_site_returns_a_checked_region(points):
    site = points.site("conv1", channel=[-1, 0], row=slice(2, 4))
    assert site.indices == (("channel", (7, 0)), ("row", (2, 3)))
    assert site.point is points["conv1"]


def test_site_takes_an_alias_for_the_hook_point_it_means(blocks):
    assert blocks.site("tied", feature=1) == blocks.site("embedder.block2", feature=1)


def test_a_name_may_say_out_where_the_registry_leaves_it_out(blocks):
    assert blocks["embedder.block1.out"] is blocks["embedder.block1"]
    assert blocks["tied.out"] is blocks["embedder.block2"]
    assert blocks["relu#1.out"] is blocks["relu#1"]
    assert blocks[".out['a']"] is blocks['.out["a"]']


def test_an_index_along_the_batch_is_kept_as_written(points):
    assert points.site("conv1", batch=-1).indices == (("batch", (-1,)),)


def test_binding_twice_gives_the_same_site(points):
    site = points.site("conv1", channel=3)
    assert points.bind(site) is site


@pytest.mark.parametrize(
    ("name", "indices", "error"),
    [
        ("conv3", {}, HookPointError),
        ("relu", {}, HookPointError),
        ("conv1", {"channel": 8}, SiteError),
        ("conv1", {"feature": 0}, SiteError),
        ("fc", {"feature": -5}, SiteError),
        ("conv1", {"row": [True] * 9}, SiteError),
    ],
)
def test_a_site_that_does_not_exist_is_refused_when_it_is_made(points, name, indices, error):
    with pytest.raises(error):
        points.site(name, **indices)


def test_the_name_of_a_module_with_several_hook_points_lists_them(blocks):
    with pytest.raises(HookPointError, match="'relu' does not identify a hook point.*: relu#0.in"):
        blocks["relu"]


@pytest.mark.parametrize(
    ("axis", "length"),
    [("batch", None), ("channel", 8), ("row", 8), ("col", 8)],
    ids=["batch", "channel", "row", "col"],
)
def test_a_hook_point_knows_the_length_of_each_axis_but_the_batch(points, axis, length):
    assert points["conv1"].length(axis) == length


def test_lengths_are_right_where_the_batch_is_not_the_first_axis():
    point = hook_points(nn.LSTM(6, 4), torch.randn(5, 2, 6), axes={".in[0]": ("position", "batch", "feature")})[
        ".out[0]"
    ]
    assert [point.length(axis) for axis in point.axes] == [5, None, 4]


def test_hook_points_print_as_a_table(shared_module):
    printed = repr(hook_points(shared_module.module, *shared_module.inputs(2))).splitlines()
    assert printed[:4] == [
        "10 hook points of SharedModule, in execution order",
        "hook point              axes            shape without batch  dtype    module        parameters",
        ".in[0]                  batch, feature  6                    float32  SharedModule  84",
        "fc1.in[0]               batch, feature  6                    float32  Linear        42",
    ]
    assert printed[8] == "fc2 = tied              batch, feature  6                    float32  Linear        42"
    assert len(printed) == 12


def test_the_table_says_where_no_batch_is_proved_and_what_was_not_called():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.never = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, vector):
            return self.fc(vector).sum(0)

    lines = repr(hook_points(Silent(), torch.randn(2, 6))).splitlines()
    assert lines[-2:] == ["Hook points with unknown batch axis (1): .out", "Not called: never"]


def test_the_html_table_has_a_row_per_hook_point_and_escapes_names(blocks):
    page = blocks._repr_html_()
    assert page.count("<tr>") == len(blocks) + 1
    assert "<td>.out[&quot;[a]&quot;]</td>" in page


def test_the_names_that_complete_are_those_that_can_be_looked_up(blocks):
    completions = blocks._ipython_key_completions_()
    assert set(blocks) < set(completions)
    assert "tied" in completions
    assert all(blocks[name] for name in completions)


def test_hook_points_can_be_pickled_with_their_model(points):
    again = pickle.loads(pickle.dumps(points))
    assert dict(again) == dict(points)
    assert list(again.site("conv1", channel=2).indices) == [("channel", (2,))]


class Acting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def act(self, x):
        return self.fc(x).relu()


def test_hook_points_of_a_method_can_be_pickled_and_used():
    x = torch.ones(2, 4)
    points = hook_points(Acting(), x, method="act")
    again = pickle.loads(pickle.dumps(points))
    assert (again.method, [*again]) == ("act", [*points])
    with patched(again, zero_ablate(again.site("fc", feature=1))):
        assert (again.model.act(x)[:, 1] == 0).all()
        with pytest.raises(ConcurrencyError, match="cannot be pickled while it is patched"):
            pickle.dumps(again)
    assert torch.equal(again.model.act(x), points.model.act(x))


def test_all_faults_of_several_sites_are_named_at_once(points):
    with pytest.raises((SiteError, HookPointError)) as caught:
        bound(points, [Site("conv3"), Site("conv1", channel=8), Site("fc", head=1), Site("fc")])
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 errors:"
    assert [line.startswith("- ") for line in lines[1:]] == [True] * 3


def test_the_html_table_says_what_was_not_called_and_where_the_batch_is_not_proved():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(6, 6)

        def forward(self, vector):
            return torch.ones(3)

    page = hook_points(Silent(), torch.randn(2, 6))._repr_html_()
    assert page.endswith("<p>Hook points with unknown batch axis (1): .out</p><p>Not called: never</p>")


class Projected(NamedTuple):
    proj: torch.Tensor


class Clashing(nn.Module):
    """Returns `.proj`, and has a submodule `out` with a submodule `proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential()
        self.out.add_module("proj", nn.Linear(4, 4))

    def forward(self, vector: torch.Tensor) -> Projected:
        return Projected(self.out(vector) * 2)


def test_a_model_in_which_two_hook_points_have_the_same_name_is_refused():
    with pytest.raises(HookPointError) as caught:
        hook_points(nn.Sequential(Clashing()), torch.randn(3, 4))
    assert str(caught.value) == (
        "Two hook points have the name '0.out.proj': a submodule, and an entry in a module's input or output. Rename "
        "the submodule or the entry."
    )
