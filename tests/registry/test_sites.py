"""A region as plain data."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from chanpatch.errors import SiteError
from chanpatch.registry import Site, hook_points

AXES = ("batch", "channel", "row", "col")
LENGTHS = (4, 8, 8, 8)

# An index, and the positions it means on an axis of length 8.
INDICES = {
    "int": (5, [5]),
    "negative int": (-1, [7]),
    "numpy int": (np.int64(3), [3]),
    "list": ([5, 1], [5, 1]),
    "negative list": ([-8, -1], [0, 7]),
    "tuple": ((0, 2), [0, 2]),
    "range": (range(1, 8, 3), [1, 4, 7]),
    "tensor": (torch.tensor([6, 2]), [6, 2]),
    "tensor of no axes": (torch.tensor(4), [4]),
    "numpy array": (np.array([0, 7]), [0, 7]),
    "slice": (slice(2, 5), [2, 3, 4]),
    "open slice": (slice(6, None), [6, 7]),
    "slice beyond the end": (slice(6, 100), [6, 7]),
    "negative slice": (slice(-3, -1), [5, 6]),
    "stepped slice": (slice(1, None, 3), [1, 4, 7]),
    "slice backwards": (slice(None, None, -3), [7, 4, 1]),
    "slice backwards by one": (slice(3, 1, -1), [3, 2]),
    "mask": ([True, False, False, True, False, False, False, True], [0, 3, 7]),
    "mask tensor": (torch.arange(8) > 5, [6, 7]),
    "numpy mask": (np.arange(8) < 2, [0, 1]),
    "full slice": (slice(None), list(range(8))),
}


@pytest.fixture(params=list(INDICES))
def index(request):
    return INDICES[request.param]


def positions(site: Site) -> list[int]:
    found = site.positions(AXES, LENGTHS)[1]
    return list(range(8)[found]) if isinstance(found, slice) else found


def test_an_index_means_what_python_means_by_it(index):
    written, meant = index
    assert positions(Site("conv", channel=written)) == meant
    by_numpy = np.arange(8)[written if isinstance(written, slice) else np.asarray(written)]
    assert np.atleast_1d(by_numpy).tolist() == meant


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_index_is_of_the_axis_it_names(number):
    assert Site("conv", **{AXES[number]: 2}).positions(AXES, LENGTHS) == {number: slice(2, 3)}


def test_a_site_that_names_no_axis_means_all_of_it():
    assert Site("conv").positions(AXES, LENGTHS) == {}


def test_two_sites_of_one_index_are_equal_and_hash_alike(index):
    written, _ = index
    one, other = Site("conv", channel=written, row=1), Site("conv", row=1, channel=written)
    assert one == other
    assert hash(one) == hash(other)


def test_a_site_can_be_pickled_and_copied(index):
    site = Site("conv", channel=index[0])
    assert pickle.loads(pickle.dumps(site)) == copy.deepcopy(site) == copy.copy(site) == site


def test_a_bound_site_can_be_pickled(plain_cnn):
    site = hook_points(plain_cnn.module, *plain_cnn.inputs(2)).site("conv1", channel=5)
    again = pickle.loads(pickle.dumps(site))
    assert again == site
    assert again.point == site.point


def test_the_same_region_written_in_another_way_is_equal_once_bound(plain_cnn, index):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    written, meant = index
    assert points.site("conv1", channel=written) == points.site("conv1", channel=meant)
    assert hash(points.site("conv1", channel=written)) == hash(points.site("conv1", channel=meant))


def test_all_of_an_axis_is_the_same_as_not_naming_it_once_bound(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    assert points.site("conv1", channel=range(8)) == points.site("conv1")


def test_the_same_channels_in_another_order_are_another_region(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    assert points.site("conv1", channel=[5, 1]) != points.site("conv1", channel=[1, 5])


def test_binding_changes_no_site(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    site = Site("conv1", channel=-1)
    assert points.bind(site).indices == (("channel", (7,)),)
    assert site.indices == (("channel", (-1,)),)
    assert site.point is None


def test_attaching_a_trace_changes_no_site(plain_cnn):
    point = hook_points(plain_cnn.module, *plain_cnn.inputs(2))["conv1"]
    site = Site("conv1", channel=5)
    traced = site.at(point)
    assert traced == site
    assert (site.point, traced.point) == (None, point)


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("conv"), "Site('conv')"),
        (Site("conv", channel=5), "Site('conv', channel=5)"),
        (Site("conv", channel=[5, 1]), "Site('conv', channel=[5, 1])"),
        (Site("conv", channel=[1, 2, 3]), "Site('conv', channel=1:4)"),
        (Site("conv", row=slice(2, 5), channel=0), "Site('conv', channel=0, row=2:5)"),
        (Site("conv", row=slice(None, None, -1)), "Site('conv', row=::-1)"),
        (Site("conv", row=slice(2, None)), "Site('conv', row=2:)"),
        (Site("conv", row=[True, False]), "Site('conv', row=[True, False])"),
    ],
)
def test_a_site_prints_as_it_is_written(site, text):
    assert repr(site) == text


def test_split_gives_one_site_per_index_in_order():
    assert Site("conv", channel=[5, 1], row=2).split("channel") == (
        Site("conv", channel=5, row=2),
        Site("conv", channel=1, row=2),
    )


def test_split_of_an_axis_that_is_not_named_takes_all_of_it_from_the_trace(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    parts = points.site("conv1", row=1).split("channel")
    assert parts == tuple(points.site("conv1", row=1, channel=channel) for channel in range(8))
    assert all(part.point is points["conv1"] for part in parts)


def test_split_of_a_slice_that_is_bound_gives_its_indices(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    assert len(points.site("conv1", channel=slice(2, 8, 2)).split("channel")) == 3


@pytest.mark.parametrize("axis", ["channel", "batch", "chanel"])
def test_split_of_an_axis_of_unknown_length_is_refused(axis):
    with pytest.raises(SiteError, match=f"cannot be split along '{axis}'"):
        Site("conv").split(axis)


def test_the_batch_cannot_be_split_even_when_traced(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    with pytest.raises(SiteError, match="the batch size varies between forward passes"):
        points.site("conv1").split("batch")


@pytest.mark.parametrize(
    "index",
    [1.5, None, True, ["a", 1], [], [1.5], [True, 1], [[1], [2]], torch.tensor([0.5]), {1}, np.array([])],
    ids=str,
)
def test_what_is_no_index_is_refused_at_once(index):
    with pytest.raises(SiteError, match="an index must be|selects nothing"):
        Site("conv", channel=index)


def test_a_mask_that_selects_nothing_is_refused_at_once():
    with pytest.raises(SiteError, match="the mask over channel selects nothing"):
        Site("conv", channel=[False, False])


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(SiteError, match="expects the name of a hook point, not int"):
        Site(3)


@pytest.mark.parametrize(
    ("indices", "fault"),
    [
        ({"channel": 8}, "channel 8 is out of range"),
        ({"channel": -9}, "channel -9 is out of range"),
        ({"channel": [0, 9, 10]}, "channel indices 9, 10 are out of range"),
        ({"channel": range(100)}, "channel indices 8, 9, 10, 11, 12, 13, 14, 15 and 84 more are out of range"),
        ({"channel": [*range(8), *[0] * 100_000]}, "channel 0 is listed twice"),
        ({"channel": [7, -1]}, "channel 7 is listed twice"),
        ({"channel": slice(8, None)}, "channel=8: selects nothing"),
        ({"channel": [True] * 7}, "the mask over channel has length 7"),
        ({"chanel": 5}, r"there is no axis 'chanel' \(did you mean 'channel'\?\)"),
        ({"head": 5}, "there is no axis 'head'"),
    ],
)
def test_what_a_hook_point_does_not_have_is_refused_when_positions_are_known(indices, fault):
    with pytest.raises(SiteError, match=fault):
        Site("conv", **indices).positions(AXES, LENGTHS)


def test_an_unknown_axis_without_a_near_name_is_an_error_that_shows_how_to_name_axes():
    with pytest.raises(SiteError) as caught:
        Site("conv", head=5).positions(AXES, LENGTHS)
    assert str(caught.value) == (
        f"Site('conv', head=5): there is no axis 'head'; hook point 'conv' has axes ({', '.join(AXES)}). To name or "
        "split axes, pass axes={...} to hook_points(); for a transformers model, pass "
        "axes=chanpatch.huggingface.axes(model)."
    )


def test_a_position_out_of_range_is_an_error_that_explains_the_cache_of_keys_and_values():
    with pytest.raises(SiteError) as caught:
        Site("h.0", position=2).positions(("batch", "position", "feature"), (3, 1, 8))
    assert str(caught.value) == (
        "Site('h.0', position=2): position 2 is out of range; hook point 'h.0' has axes (batch, position, feature) and "
        "1 positions (0 to 0). Positions are counted within one forward pass. With a key-value cache, later passes "
        "contain only the new tokens."
    )


def test_all_faults_of_a_site_are_named_at_once():
    with pytest.raises(SiteError) as caught:
        Site("conv", channel=64, row=[7, -1], head=0).positions(AXES, LENGTHS)
    assert all(fault in str(caught.value) for fault in ("channel 64", "row 7 is listed twice", "no axis 'head'"))


def test_a_slice_that_runs_on_is_found_as_a_slice_so_that_it_is_read_without_a_copy():
    assert Site("conv", row=[2, 3, 4]).positions(AXES, LENGTHS) == {2: slice(2, 5)}
    assert Site("conv", row=[4, 3]).positions(AXES, LENGTHS) == {2: [4, 3]}


def test_flags_tell_what_to_split_into_without_a_trace():
    parts = Site("0", channel=[True, False, True]).split("channel")
    assert parts == (Site("0", channel=0), Site("0", channel=2))


def test_the_ends_of_a_slice_may_be_numbers_of_numpy():
    assert Site("0", row=slice(np.int64(1), np.int64(3))) == Site("0", row=slice(1, 3))
