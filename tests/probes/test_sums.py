"""Channel sums against the same sums by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from models import build
from torch import Tensor, nn

from chanpatch import channel_sums, errors, hook_points, run_with_cache


@pytest.fixture
def cnn():
    model = build("plain_cnn")
    images = torch.randn(10, 3, 8, 8)
    return hook_points(model.module, images[:2]), images, model.module.conv1(images).relu().detach().double()


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [
        ("sum", lambda activation: activation.sum((2, 3))),
        ("mean", lambda activation: activation.mean((2, 3))),
        ("max", lambda activation: activation.amax((2, 3))),
        ("norm", lambda activation: activation.square().sum((2, 3)).sqrt()),
    ],
)
def test_channel_sums_are_those_taken_by_hand_whatever_the_batch_size(cnn, reduce, by_hand):
    points, images, activation = cnn
    for batch_size in (3, 64):
        sums = channel_sums(points, images, "relu1", reduce=reduce, batch_size=batch_size)
        assert sums.dtype == np.float64
        np.testing.assert_allclose(sums, by_hand(activation), rtol=1e-6)


def test_a_region_has_the_sums_of_its_own_channels_and_positions(cnn):
    points, images, activation = cnn
    sums = channel_sums(points, images, points.site("relu1", channel=[5, 2], row=slice(3)))
    np.testing.assert_allclose(sums, activation[:, [5, 2], :3].sum((2, 3)), rtol=1e-6)


def test_a_feature_axis_will_do_for_channels_and_has_the_absolute_value_for_a_norm(cnn):
    points, images, _ = cnn
    logits = points.model(images).detach().double()
    np.testing.assert_allclose(channel_sums(points, images, "fc"), logits, rtol=1e-6)
    np.testing.assert_allclose(channel_sums(points, images, "fc", reduce="norm"), logits.abs(), rtol=1e-6)


def test_positions_before_the_batch_axis_are_summed_too():
    model, sequence = nn.LSTM(6, 4), torch.randn(5, 3, 6)
    points = hook_points(model, sequence, axes={".in[0]": ("position", "batch", "feature")})
    by_hand = model(sequence)[0].detach().double().sum(0)
    np.testing.assert_allclose(channel_sums(points, [sequence], ".out[0]"), by_hand, rtol=1e-5)


def test_a_layer_of_a_recurrent_state_has_sums():
    torch.manual_seed(0)
    model, sequence = nn.LSTM(6, 4, 2, batch_first=True), torch.randn(5, 3, 6)
    points = hook_points(model, sequence)
    sums = channel_sums(points, sequence, points.site(".out[1][0]", layer=1), batch_size=2)
    np.testing.assert_allclose(sums, model(sequence)[1][0][1].detach().double(), rtol=1e-5)


def test_inputs_may_be_a_tensor_the_arguments_the_keywords_or_batches_of_these():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, one, other):
            return self.relu(one - other)

    one, other = torch.rand(2, 7, 4)
    points = hook_points(Difference(), one, other, axes={"relu": ("batch", "feature")})
    by_hand = (one - other).relu().double()
    batches = ((one[part], other[part]) for part in (slice(0, 2), slice(2, 7)))
    for inputs in ((one, other), {"one": one, "other": other}, batches):
        np.testing.assert_allclose(channel_sums(points, inputs, "relu", batch_size=3), by_hand)


def test_an_einops_pair_reduces_as_it_says(cnn):
    points, images, activation = cnn
    for pair, by_hand in (
        (("b c h w -> b h", "max"), activation.amax((1, 3))),
        (("b c h w -> c b", lambda region, over: region.square().sum(over)), activation.square().sum((2, 3))),
        (("b c h w -> b", "mean"), activation.mean((1, 2, 3))[:, None]),
    ):
        np.testing.assert_allclose(channel_sums(points, images, "relu1", reduce=pair, batch_size=3), by_hand, rtol=1e-6)


def test_reductions_that_are_none_are_refused(cnn):
    points, images, _ = cnn
    for reduce, message in (
        (
            "median",
            "reduce must be 'sum', 'mean', 'max', 'norm' or a pair such as ('b c h w -> b c', 'sum'); got 'median'. "
            "Did you mean 'mean'?",
        ),
        (
            ("b c h w -> b c h", "sum"),
            "reduce=('b c h w -> b c h', 'sum') leaves axes (batch, channel, row) at Site('relu1'), but must keep the "
            "batch axis and at most one other axis.",
        ),
    ):
        with pytest.raises(errors.SiteError) as caught:
            channel_sums(points, images, "relu1", reduce=reduce)
        assert str(caught.value) == message


def test_sums_add_in_double_precision():
    points = hook_points(
        nn.Sequential(nn.Identity()), torch.zeros(2, 1, 3), axes={".in[0]": ("batch", "channel", "col")}
    )
    assert channel_sums(points, torch.tensor([[[1e8, 1.0, -1e8]]]), "0").item() == 1.0


def test_channel_sums_stop_at_the_site_and_leave_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.calls = nn.BatchNorm1d(3), nn.Dropout(), 0

        def forward(self, rows):
            self.drop(self.norm(rows))
            self.calls += 1

    model, rows = Counting(), torch.rand(6, 3)
    points = hook_points(model, rows)
    calls, buffer, state = model.calls, model.norm.running_mean.clone(), torch.get_rng_state()
    channel_sums(points, rows, "drop", batch_size=2)
    assert model.calls == calls and model.training
    assert torch.equal(model.norm.running_mean, buffer) and torch.equal(torch.get_rng_state(), state)


def test_channel_sums_need_no_tqdm(cnn, monkeypatch):
    points, images, activation = cnn
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    np.testing.assert_allclose(channel_sums(points, images, "relu1"), activation.sum((2, 3)), rtol=1e-6)


def test_channel_sums_are_those_that_recording_reduces(model):
    points = hook_points(model.module, *model.inputs(3))
    inputs = model.inputs(5)
    recorded = run_with_cache(points, *inputs, sites=model.site, reduce="sum", stop=True)[model.site]
    assert channel_sums(points, inputs, model.site) == pytest.approx(recorded.double().numpy(), rel=1e-4, abs=1e-5)


class Complex(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return torch.complex(vector, 2 * vector)


def test_sums_of_complex_activations_are_refused_where_half_of_them_would_be_lost() -> None:
    points = hook_points(nn.Sequential(Complex()), torch.randn(2, 3), axes={"0": ("batch", "feature")})
    with pytest.raises(errors.SiteError, match="complex64.*view_as_real"):
        channel_sums(points, torch.randn(2, 3), "0")


class Bank(nn.Module):
    """Looks every input up among keys that all of them share."""

    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, vector, keys):
        return self.head(torch.softmax(self.query(vector) @ keys.T, -1) @ keys)


def test_an_input_that_the_trace_shows_to_have_no_batch_is_not_cut_where_it_is_as_long_as_there_are_inputs():
    model, vectors, keys = Bank(), torch.randn(20, 4), torch.randn(20, 4)
    points = hook_points(model, vectors[:3], keys)
    expected = model(vectors, keys).detach()
    np.testing.assert_allclose(channel_sums(points, (vectors, keys), "head", batch_size=6), expected, atol=1e-6)


def test_a_site_that_names_rows_is_refused_since_each_batch_has_rows_of_its_own(plain_cnn):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    with pytest.raises(errors.ProbeError, match="selects rows.*Omit batch="):
        channel_sums(points, *plain_cnn.inputs(6), points.site("relu1", batch=[0, 2]))


def plain():
    model = build("plain_cnn")
    return hook_points(model.module, *model.inputs(2))


REFUSED = {
    "a batch on another axis": (
        lambda: channel_sums(hook_points(nn.LSTM(3, 4), torch.randn(70, 10, 3)), torch.randn(70, 10, 3), ".out[0]"),
        "The batch axis of the model's first input is axis 1, but inputs are split into batches along axis 0. Wrap the "
        "model in a module whose inputs have the batch axis first.",
    ),
    "several layers": (
        lambda: channel_sums(
            hook_points(nn.LSTM(3, 4, 2, batch_first=True), torch.randn(9, 7, 3)), torch.randn(9, 7, 3), ".out[1][0]"
        ),
        "Site('.out[1][0]') has 2 layers, each with its own features. Select one layer, as in layer=0.",
    ),
    "an empty batch": (
        lambda: channel_sums(plain(), torch.zeros(2, 3, 8, 8), "relu1", batch_size=0),
        "batch_size must be a whole number, at least 1; got 0.",
    ),
    "no inputs": (
        lambda: channel_sums(plain(), torch.zeros(0, 3, 8, 8), "relu1"),
        "inputs is empty: pass at least one input.",
    ),
    "rows of the batch": (
        lambda: channel_sums(plain(), torch.zeros(2, 3, 8, 8), plain().site("relu1", batch=0)),
        "Site('relu1', batch=0) selects rows of the batch, but every input is used. Omit batch= from the site, and "
        "pass only the inputs to use.",
    ),
    "a site without channels": (
        lambda: channel_sums(
            hook_points(nn.Identity(), torch.zeros(2, 3), axes={".out": ("batch", "row")}), torch.zeros(2, 3), ".out"
        ),
        "Site('.out') has axes (batch, row). Channel sums need a batch axis and exactly one axis named channel or "
        "feature. Name axes with hook_points(..., axes={...}).",
    ),
    "a site whose batch axis is not proved": (
        lambda: channel_sums(hook_points(nn.Linear(3, 2), torch.zeros(3)), torch.zeros(2, 3), ".out"),
        "Site('.out') has axes (feature), and its batch axis is unknown. Channel sums need a batch axis and exactly "
        "one axis named channel or feature. Name axes with hook_points(..., axes={...}).",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sums_that_do_not_exist_are_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ProbeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_model_is_traced_with_the_first_batch_and_no_batch_is_lost():
    model, images = nn.Conv2d(3, 8, 3), torch.randn(10, 3, 5, 5)
    expected = channel_sums(hook_points(model, images), images, ".out", batch_size=4)
    for inputs in (images, iter(images.split(4)), list(images.split(4))):
        assert np.array_equal(channel_sums(model, inputs, ".out", batch_size=4), expected)


def test_sums_of_neither_a_model_nor_its_hook_points_are_refused():
    with pytest.raises(TypeError, match=r"^Expected HookPoints or a torch\.nn\.Module, not list\.$"):
        channel_sums([], torch.zeros(2, 2), "")


def test_an_array_of_inputs_is_refused():
    with pytest.raises(TypeError) as caught:
        channel_sums(plain(), np.zeros((2, 3, 8, 8)), "relu1")
    assert str(caught.value) == "Inputs must be tensors; got a NumPy array. Pass torch.as_tensor(array)."


def test_a_model_without_any_batch_cannot_be_traced():
    with pytest.raises(
        errors.BatchAxisError, match="The inputs are empty, so the model cannot be traced. Pass at least one batch."
    ):
        channel_sums(nn.Linear(2, 2), [], "")
