"""Axes that are split by names: every value equals the one from reshaping the tensor by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chanpatch
from chanpatch import (
    PatchedPolicy,
    channel_sums,
    contrast,
    hook_points,
    load,
    mean_ablate,
    patch_in,
    patched,
    recording,
    run_with_cache,
    save,
    steer,
    sweep,
    view,
    zero_ablate,
)
from chanpatch.errors import EditError, ProbeError, SiteError, TraceMismatchError
from chanpatch.patching import Context
from chanpatch.sweeps import attribution

HEADS = view("batch position (part head feature)", part=("q", "k", "v"), head=4)


class Attention(nn.Module):
    """A causal attention layer with the queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def points(model, x):
    return hook_points(model, x, axes={"qkv": HEADS, "out.in[0]": view("batch position (head feature)", head=4)})


def by_hand(model, x, change):
    """Run the model with the output of `qkv`, split by hand, changed in place."""

    def hook(_module, _args, output):
        output = output.clone()
        change(output.view(*output.shape[:2], 3, 4, 2))
        return output

    handle = model.qkv.register_forward_hook(hook)
    try:
        return model(x)
    finally:
        handle.remove()


def test_a_split_axis_has_names_lengths_and_labels(points):
    point = points["qkv"]
    assert (point.axes, point.shape) == (("batch", "position", "part", "head", "feature"), (5, 3, 4, 2))
    assert (point.batch_axis, point.labels("part")) == (0, ("q", "k", "v"))
    assert repr(points.site("qkv", part="k", head=-1)) == "Site('qkv', head=3, part='k')"


@torch.no_grad()
def test_a_patch_of_one_head_equals_the_patch_by_hand(model, points, x):
    with patched(points, zero_ablate(points.site("qkv", part="q", head=2))) as ledger:
        found = model(x)
    expected = by_hand(model, x, lambda split: split[:, :, 0, 2].zero_())
    assert torch.equal(found, expected) and not torch.equal(found, model(x))
    assert ledger.to_records()[0]["elements"] == 3 * 5 * 2
    assert torch.equal(PatchedPolicy(points, zero_ablate(points.site("qkv", part="q", head=2)))(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("labels", [["k", "v"], [1, 2], slice(1, 3), [False, True, True]])
def test_labels_and_indices_select_the_same_parts(model, points, x, labels):
    with patched(points, steer(points.site("qkv", part=labels, head=[0, 3]), 1.0)):
        found = model(x)

    def change(split):
        for part in (1, 2):
            split[:, :, part, [0, 3]] += 1

    assert torch.equal(found, by_hand(model, x, change))


@torch.no_grad()
def test_reading_is_a_view_of_the_same_values(model, points, x):
    whole = model.qkv(x)
    site = points.site("qkv", part="v", head=1)
    _, cache = run_with_cache(points, x, sites=["qkv", site])
    assert torch.equal(cache["qkv"], whole.view(3, 5, 3, 4, 2))
    assert torch.equal(cache[site], whole.view(3, 5, 3, 4, 2)[:, :, 2:, 1:2])
    assert cache.axes(site) == ("batch", "position", "part", "head", "feature")
    assert HEADS.split(whole).data_ptr() == whole.data_ptr()
    with recording(points, "qkv", reduce=("b p k h f -> b k h", "sum")) as sums:
        model(x)
    torch.testing.assert_close(sums["qkv"], whole.view(3, 5, 3, 4, 2).sum(dim=(1, 4)))


@torch.no_grad()
def test_donors_and_means_have_the_split_axes(model, points, x):
    other, site = x.flip(0), points.site("qkv", part="k")
    whole, donor = model.qkv(x).view(3, 5, 3, 4, 2), model.qkv(other).view(3, 5, 3, 4, 2)
    _, cache = run_with_cache(points, other, sites="qkv")
    with patched(points, patch_in(site, cache)):
        found = model(x)
    assert torch.equal(found, by_hand(model, x, lambda split: split[:, :, 1].copy_(donor[:, :, 1])))
    with patched(points, mean_ablate(site, cache)):
        found = model(x)
    assert torch.equal(found, by_hand(model, x, lambda split: split[:, :, 1].copy_(donor[:, :, 1].mean(0))))
    assert whole.shape == donor.shape


@torch.no_grad()
def test_a_vector_has_the_split_axes(model, points, x):
    vector = torch.tensor([1.0, -2.0])
    with patched(points, steer(points.site("qkv", part="k", head=2), vector.view(1, 1, 1, 1, 2), 0.5)):
        found = model(x)
    assert torch.equal(found, by_hand(model, x, lambda split: split[:, :, 1, 2].add_(0.5 * vector)))


@torch.no_grad()
def test_a_where_has_the_split_axes(model, points, x):
    def where(context: Context) -> Tensor:
        return (context.inputs[0].sum(-1) > 0)[:, :, None, None, None]

    with patched(points, zero_ablate(points.site("qkv", part="v"), where=where)):
        found = model(x)
    chosen = x.sum(-1) > 0

    def change(split):
        split[:, :, 2][chosen] = 0

    assert torch.equal(found, by_hand(model, x, change))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "vmap", "resume", "loop"])
def test_a_sweep_over_heads_equals_patches_by_hand(model, points, x, strategy):
    patches = [zero_ablate(site) for site in points.site("qkv", part="v").split("head")]
    result = sweep(points, x, patches=patches, metric=lambda output: output[:, -1, 0], strategy=strategy)
    for head, values in enumerate(result.values["metric"]):

        def change(split, head=head):
            split[:, :, 2, head] = 0

        torch.testing.assert_close(torch.tensor(values).float(), by_hand(model, x, change)[:, -1, 0])


def test_attribution_over_heads_is_exact_where_the_model_is_linear(model, points, x):
    patches = [zero_ablate(site) for site in points.site("out.in[0]").split("head")]
    result = attribution(points, x, patches=patches, metric=lambda output: output[:, -1, 0])
    torch.testing.assert_close(torch.tensor(result.effect()), torch.tensor(result.exact), atol=1e-6, rtol=1e-5)


def test_a_contrast_ranks_the_features_of_each_head(points, x):
    found = contrast(points, x, x + 1, points.site("qkv", part="q", head=0))
    assert len(found.to_records()) == 2


def test_the_batch_may_be_one_of_the_split_axes(x):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(len(x), -1, 4)

    model = Flat()
    points = hook_points(model, x, axes={"layer": view("(batch position) feature", position=5)})
    assert (points["layer"].axes, points["layer"].batch_axis) == (("batch", "position", "feature"), 0)
    with torch.no_grad(), patched(points, zero_ablate(points.site("layer", position=2))):
        found = model(x)
    assert not found[:, 2].any() and torch.equal(found[:, 3], model(x)[:, 3])


def test_a_saved_patch_of_a_head_is_loaded_with_the_same_view(tmp_path, model, points, x):
    save(tmp_path / "head.safetensors", zero_ablate(points.site("qkv", part="q", head=2)))
    patches = load(tmp_path / "head.safetensors", points)
    with torch.no_grad(), patched(points, patches):
        found = model(x)
    assert torch.equal(found, by_hand(model, x, lambda split: split[:, :, 0, 2].zero_()))


@pytest.mark.parametrize(
    ("pattern", "lengths", "message"),
    [
        ("batch (head feature", {}, "expected axis names and groups in parentheses"),
        ("batch (head feature)", {}, "the lengths of head and feature are unknown"),
        ("batch (head head)", {"head": 2}, "has two axes named 'head'"),
        ("batch feature", {"head": 2}, "has no axis 'head'"),
        ("batch (head feature)", {"head": 0}, "head must be a positive length or a list of distinct labels; got 0"),
        (
            "batch (part feature)",
            {"part": (1, 2)},
            "part must be a positive length or a list of distinct labels; got (1, 2)",
        ),
        ("batch (part feature)", {"part": 2.0}, "part must be a positive length or a list of distinct labels; got 2.0"),
        ("batch (part feature)", {"part": ("q", "q")}, "part must be a positive length or a list of distinct labels"),
    ],
)
def test_a_pattern_that_is_not_valid_is_an_error(pattern, lengths, message):
    with pytest.raises(SiteError, match=message.replace("(", r"\(").replace(")", r"\)")):
        view(pattern, **lengths)


def test_a_view_that_does_not_fit_is_an_error_when_the_model_is_traced(model, x):
    with pytest.raises(SiteError) as caught:
        hook_points(model, x, axes={"qkv": view("batch position (head feature)", head=7)})
    assert str(caught.value) == (
        "axes={'qkv': 'batch position (head feature)'} does not match hook point 'qkv': an axis of length 24 cannot be "
        "split into head 7 x feature."
    )


def test_an_unknown_label_is_an_error_that_lists_the_labels(points):
    with pytest.raises(SiteError) as caught:
        points.site("qkv", part="w")
    assert str(caught.value) == "Site('qkv', part='w'): part has no label 'w'. The labels are q, k, v."
    with pytest.raises(SiteError, match="head='q' uses labels, but head has no labels"):
        points.site("qkv", head="q")


def test_a_vector_without_the_split_axes_is_an_error(points):
    with pytest.raises(EditError, match="has shape"):
        steer(points.site("qkv", part="q"), torch.ones(1, 1, 8))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_free_axis_has_any_length(model, x, rows, length):
    points = hook_points(model, x, axes={"qkv": HEADS}, free={"position": 1})
    assert points["qkv"].shape == (None, 3, 4, 2) and points["qkv"].length("position") is None
    other = torch.randn(rows, length, 8)
    site = points.site("qkv", part="v", position=-1)
    with patched(points, zero_ablate(site)), recording(points, site) as cache:
        found = model(other)

    def change(split):
        split[:, -1, 2] = 0

    assert torch.equal(found, by_hand(model, other, change))
    assert not cache[site].any() and cache[site].shape == (rows, 1, 1, 4, 2)


@torch.no_grad()
def test_a_fixed_axis_is_not_free(model, points, x):
    with pytest.raises(TraceMismatchError) as caught, patched(points, zero_ablate(points.site("qkv", head=0))):
        model(x[:, :3])
    assert str(caught.value) == (
        "Hook point 'qkv' has shape (3, 3, 24) in this forward pass, but axes (batch, position, part, head, feature) = "
        "(any, 5, 3, 4, 2) in the trace. Call hook_points() with inputs like the ones in this forward pass. For inputs "
        "of varying length, pass free={'position': 1} to hook_points()."
    )


@pytest.mark.parametrize(
    ("shape", "free", "message"),
    [
        ((3, 3, 8), {"position": 1}, "axis 1 must be at least 2 and differ from the batch size"),
        ((3, 1, 8), {"position": 1}, "axis 1 must be at least 2 and differ from the batch size"),
        ((3, 5, 8), {"position": 0}, "the batch axis can already have any length"),
        ((3, 5, 8), {"batch": 1}, "the batch axis can already have any length"),
        ((3, 5, 8), {"position": 5}, "the first input has no axis 5"),
        ((3, 5, 8), {"feature": 2}, "the model fails if the length of this axis increases by 1"),
    ],
)
def test_an_axis_that_cannot_be_free_is_an_error(model, shape, free, message):
    with pytest.raises(SiteError, match=message):
        hook_points(model, torch.randn(shape), free=free)


def test_an_input_with_the_length_on_another_axis_is_an_error():
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (mask.to(x.dtype) @ x).tanh()

    with pytest.raises(SiteError) as caught:
        hook_points(Masked(), torch.randn(3, 5, 8), torch.ones(3, 5, 5), free={"position": 1})
    assert str(caught.value) == (
        "free={'position': 1}: another input has shape (3, 5, 5), so length 5 does not identify a single axis. Trace "
        "with a length that no other axis has, or without that other input."
    )


def test_an_axis_that_grows_with_the_rows_too_is_not_free():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(len(x), -1, 4)

    points = hook_points(Flat(), torch.randn(1, 5, 8), free={"position": 1})
    assert points["layer"].shape == (5, 4) and points[".out"].shape == (None, 4)


@torch.no_grad()
def test_recordings_of_several_lengths_are_joined_if_their_regions_have_one_shape(model, x):
    points = hook_points(model, x, axes={"qkv": HEADS}, free={"position": 1})
    last = points.site("qkv", position=-1)
    with recording(points, last) as cache, recording(points, "qkv", reduce="sum") as sums:
        for length in (5, 2):
            model(x[:, :length])
    by_length = [model.qkv(x[:, :length]).view(3, length, 3, 4, 2) for length in (5, 2)]
    assert torch.equal(cache[last], torch.cat([each[:, -1:] for each in by_length]))
    torch.testing.assert_close(sums["qkv"], torch.cat([each.sum((1, 2)).sum(1) for each in by_length]))
    with pytest.raises(SiteError) as caught, recording(points, "qkv"):
        for length in (5, 2):
            model(x[:, :length])
    assert str(caught.value) == (
        "Site('qkv') has shape (3, 5, 3, 4, 2) in one forward pass and (3, 2, 3, 4, 2) in another, so the activations "
        "cannot be joined along the batch axis. Record a single position (position=-1), pass reduce= to reduce the "
        "axis whose length varies, or open one recording per length."
    )


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1])
def test_rows_and_lengths_may_be_zero_or_one(model, x, length):
    model = nn.Linear(8, 24)
    points = hook_points(model, x, axes={".out": HEADS}, free={"position": 1})
    for part in (x[:, :length], x[:length]):
        with patched(points, zero_ablate(points.site(".out", head=1, part="q"))):
            found = model(part)
        expected = model(part)
        expected.view(*part.shape[:2], 3, 4, 2)[:, :, 0, 1] = 0
        assert torch.equal(found, expected)


@torch.no_grad()
def test_views_split_tensors_with_any_strides():
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.identity(x).sum(-1)

    model, expanded = Permuted(), torch.randn(3, 4, 1).expand(3, 4, 6)
    for x in (
        torch.randn(3, 6, 4).mT,
        expanded,
        torch.randn(6, 4, 3).permute(2, 1, 0),
        torch.randn(3, 4, 12)[..., ::2],
    ):
        points = hook_points(model, x, axes={"identity": view("batch (outer inner) (head feature)", outer=2, head=3)})
        with patched(points, zero_ablate(points.site("identity", outer=1, head=2))):
            found = model(x)
        expected = x.reshape(3, 2, 2, 3, 2).clone()
        expected[:, 1, :, 2] = 0
        torch.testing.assert_close(found, expected.sum((3, 4)).flatten(1))


@torch.no_grad()
def test_taps_inputs_and_tuple_outputs_of_shared_modules_have_views(x):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return chanpatch.tap("tap", self.layer(x)), {"key": self.layer(2 * x)}

    heads, model = view("batch position (head feature)", head=2), Shared()
    points = hook_points(model, x, axes=dict.fromkeys(("tap", "layer.in[0]", '.out[1]["key"]'), heads))
    with patched(points, zero_ablate(points.site("tap", head=1))):
        assert not model(x)[0][..., 4:].any()
    half, whole = model.layer(torch.cat([0 * x[..., :4], 2 * x[..., 4:]], -1)), model.layer(2 * x)
    with patched(points, zero_ablate(points.site("layer#1.in[0]", head=0))):
        torch.testing.assert_close(model(x)[1]["key"], half)
    with patched(points, steer(points.site('.out[1]["key"]', head=1), 1.0)):
        torch.testing.assert_close(model(x)[1]["key"][..., 4:], whole[..., 4:] + 1)


def test_channel_sums_of_several_heads_are_an_error_that_shows_how_to_select_one(points, x):
    with pytest.raises(ProbeError) as caught:
        channel_sums(points, x, "qkv")
    assert str(caught.value) == (
        "Site('qkv') has 3 parts, each with its own features. Select one part, as in part='q'."
    )
    assert channel_sums(points, x, points.site("qkv", part="q", head=1)).shape == (3, 2)


def test_a_contrast_compares_each_part_and_head_separately(model, points, x):
    found = contrast(points, x, x + 1, "qkv")
    difference = (model.qkv(x) - model.qkv(x + 1)).view(3, 5, 3, 4, 2).sum(1).mean(0).flatten().detach()
    torch.testing.assert_close(torch.tensor(found.difference).float(), difference, atol=1e-4, rtol=1e-4)


def test_a_view_is_public():
    assert chanpatch.view is view
