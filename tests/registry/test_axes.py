"""Axis names come from what a module is, and from nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chanpatch.engine.paths import Item
from chanpatch.registry import hook_points
from chanpatch.registry.axes import axis_names

B, C = "batch", "channel"

# Module, input, axes of the output.
NAMED = {
    "conv1d": (nn.Conv1d(3, 4, 3), (2, 3, 9), (B, C, "position")),
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 9, 8), (B, C, "row", "col")),
    "conv3d": (nn.Conv3d(3, 4, 2), (2, 3, 5, 6, 7), (B, C, "depth", "row", "col")),
    "conv transpose 1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 9), (B, C, "position")),
    "conv transpose 2d": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 9, 8), (B, C, "row", "col")),
    "conv transpose 3d": (nn.ConvTranspose3d(3, 4, 2), (2, 3, 5, 6, 7), (B, C, "depth", "row", "col")),
    "max pool 1d": (nn.MaxPool1d(2), (2, 3, 8), (B, C, "position")),
    "max pool 2d": (nn.MaxPool2d(2), (2, 3, 8, 6), (B, C, "row", "col")),
    "average pool 3d": (nn.AvgPool3d(2), (2, 3, 4, 6, 8), (B, C, "depth", "row", "col")),
    "power pool": (nn.LPPool2d(2, 2), (2, 3, 8, 6), (B, C, "row", "col")),
    "adaptive pool": (nn.AdaptiveAvgPool2d(1), (2, 3, 8, 6), (B, C, "row", "col")),
    "adaptive max pool": (nn.AdaptiveMaxPool1d(2), (2, 3, 8), (B, C, "position")),
    "pad": (nn.ZeroPad2d(1), (2, 3, 8, 6), (B, C, "row", "col")),
    "reflection pad": (nn.ReflectionPad1d(1), (2, 3, 8), (B, C, "position")),
    "pixel shuffle": (nn.PixelShuffle(2), (2, 4, 5, 6), (B, C, "row", "col")),
    "batch norm 1d over vectors": (nn.BatchNorm1d(3), (2, 3), (B, C)),
    "batch norm 1d over sequences": (nn.BatchNorm1d(3), (2, 3, 9), (B, C, "position")),
    "batch norm 2d": (nn.BatchNorm2d(3), (2, 3, 9, 8), (B, C, "row", "col")),
    "instance norm": (nn.InstanceNorm2d(3), (2, 3, 9, 8), (B, C, "row", "col")),
    "conv of a subclass": (type("Mine", (nn.Conv2d,), {})(3, 4, 3), (2, 3, 9, 8), (B, C, "row", "col")),
    "linear over vectors": (nn.Linear(6, 4), (2, 6), (B, "feature")),
    "linear over sequences": (nn.Linear(6, 4), (2, 5, 6), (B, "axis1", "feature")),
    "layer norm": (nn.LayerNorm(6), (2, 5, 6), (B, "axis1", "axis2")),
    "relu alone": (nn.ReLU(), (2, 3, 9, 8), (B, "axis1", "axis2", "axis3")),
    "flatten alone": (nn.Flatten(), (2, 3, 9, 8), (B, "feature")),
    "unflatten": (nn.Unflatten(1, (2, 3)), (2, 6), (B, "axis1", "axis2")),
    "transformer layer, batch first": (
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (2, 5, 6), (B, "position", "feature"),
    ),
    "transformer layer, position first": (
        nn.TransformerEncoderLayer(6, 2, 8), (5, 2, 6), ("position", B, "feature"),
    ),
    "transformer, batch first": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False),
        (2, 5, 6), (B, "position", "feature"),
    ),
    "gru cell": (nn.GRUCell(6, 4), (2, 6), (B, "feature")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NAMED))
def test_a_module_type_names_the_axes_of_its_output(name):
    module, lengths, axes = NAMED[name]
    assert hook_points(module.eval(), torch.randn(lengths))[".out"].axes == axes


@pytest.mark.parametrize(
    ("module", "lengths", "axes"),
    [
        (nn.Conv1d(3, 4, 3), (3, 9), (C, "position")),
        (nn.Conv2d(3, 4, 3), (3, 9, 8), (C, "row", "col")),
        (nn.Linear(6, 4), (6,), ("feature",)),
        (nn.GRUCell(6, 4), (6,), ("feature",)),
    ],
    ids=["conv1d", "conv2d", "linear", "gru cell"],
)
def test_an_unbatched_input_has_the_names_without_the_batch(module, lengths, axes):
    point = hook_points(module, torch.randn(lengths))[".out"]
    assert (point.axes, point.batch_axis) == (axes, None)


@pytest.mark.parametrize("module", [nn.MaxPool1d(2), nn.ConstantPad1d((0, -4), 0.0)], ids=["pool", "pad"])
def test_rows_without_channels_that_are_pooled_or_padded_are_the_batch(module):
    points = hook_points(nn.Sequential(nn.Linear(6, 8), module, nn.Linear(4, 2)), torch.randn(3, 6))
    assert [points[name].axes for name in ("0", "1", "2")] == [(B, "feature"), (B, "position"), (B, "feature")]


LSTM_OUTPUTS = (".out[0]", ".out[1][0]", ".out[1][1]")


@pytest.mark.parametrize(
    ("module", "lengths", "sequence"),
    [
        (nn.LSTM(6, 4, batch_first=True), (2, 5, 6), (B, "position", "feature")),
        (nn.LSTM(6, 4), (5, 2, 6), ("position", B, "feature")),
        (nn.LSTM(6, 4, num_layers=2, bidirectional=True), (5, 2, 6), ("position", B, "feature")),
    ],
    ids=["batch first", "position first", "bidirectional"],
)
def test_an_lstm_names_its_sequence_by_batch_first_and_its_states_layer_first(module, lengths, sequence):
    points = hook_points(module, torch.randn(lengths), axes={".in[0]": (*sequence[:2], "feature")})
    state = ("layer", B, "feature")
    assert [points[name].axes for name in LSTM_OUTPUTS] == [sequence, state, state]


def test_a_gru_names_its_one_state_layer_first():
    points = hook_points(nn.GRU(6, 4, batch_first=True), torch.randn(2, 5, 6))
    assert (points[".out[0]"].axes, points[".out[1]"].axes) == ((B, "position", "feature"), ("layer", B, "feature"))


def test_an_unbatched_lstm_has_no_batch_axis():
    points = hook_points(nn.LSTM(6, 4), torch.randn(5, 6))
    assert [points[name].axes for name in LSTM_OUTPUTS] == [("position", "feature"), *[("layer", "feature")] * 2]


class SelfAttention(nn.Module):
    def __init__(self, *, per_head: bool = False, **settings: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **settings)
        self.per_head = per_head

    def forward(self, sequence):
        return self.attention(sequence, sequence, sequence, average_attn_weights=not self.per_head)


@pytest.mark.parametrize(
    ("settings", "sequence", "pattern"),
    [
        ({"batch_first": True}, (B, "position", "feature"), (B, "query", "key")),
        ({}, ("position", B, "feature"), (B, "query", "key")),
        ({"batch_first": True, "per_head": True}, (B, "position", "feature"), (B, "head", "query", "key")),
    ],
    ids=["batch first", "position first", "per head"],
)
def test_attention_names_its_output_and_its_pattern(settings, sequence, pattern):
    points = hook_points(SelfAttention(**settings), torch.randn(3, 4, 6), axes={".in[0]": sequence})
    assert points["attention.out[0]"].axes == sequence
    assert points["attention.out[1]"].axes == pattern


def test_unbatched_attention_has_no_batch_axis():
    points = hook_points(SelfAttention(), torch.randn(5, 6))
    assert points["attention.out[0]"].axes == ("position", "feature")
    assert points["attention.out[1]"].axes == ("query", "key")


@pytest.mark.parametrize(
    ("axes", "expected"),
    [(None, (B, "axis1", "feature")), ((B, "position"), (B, "position", "feature"))],
    ids=["as the trace knows it", "as the user names it"],
)
def test_an_embedding_adds_a_feature_axis_to_those_of_its_indices(axes, expected):
    model = nn.Sequential(nn.Embedding(9, 6))
    named = {} if axes is None else {"0.in[0]": axes}
    assert hook_points(model, torch.zeros(2, 5, dtype=torch.long), axes=named)["0"].axes == expected


IMAGE = (B, C, "row", "col")
PASSED_ON = {
    "relu": nn.ReLU(),
    "in-place relu": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "softmax": nn.Softmax(1),
    "dropout": nn.Dropout2d(),
    "identity": nn.Identity(),
    "layer norm": nn.LayerNorm([4, 7, 6]),
    "group norm": nn.GroupNorm(2, 4),
    "local response norm": nn.LocalResponseNorm(2),
    "prelu": nn.PReLU(4),
}


@pytest.mark.parametrize("name", list(PASSED_ON))
def test_an_elementwise_module_passes_on_the_names_of_its_input(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), PASSED_ON[name])
    assert hook_points(model, torch.randn(2, 3, 9, 8))["1"].axes == IMAGE


class Functional(nn.Module):
    """A convolution, a function, and a module that takes what the function returned."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function
        self.after = nn.Identity()

    def forward(self, image):
        return self.after(self.function(self.conv(image)))


ELEMENTWISE = {
    "F.relu": F.relu,
    "relu method": lambda x: x.relu(),
    "relu_ method": lambda x: x.relu_(),
    "sum": lambda x: x + x,
    "sum of number and tensor": lambda x: 1 + x,
    "difference": lambda x: 1 - x,
    "quotient": lambda x: x / 255,
    "negation": lambda x: -x,
    "in-place sum": lambda x: x.add_(1),
    "augmented sum": lambda x: x.__iadd__(1),
    "scale by channel": lambda x: x * torch.ones(4, 1, 1),
    "dropout": functools.partial(F.dropout, p=0.5),
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "clamp": lambda x: x.clamp(0, 6),
    "contiguous": lambda x: x.contiguous(),
    "chain": lambda x: (F.gelu(x) * 2 + x).tanh(),
}


@pytest.mark.parametrize("name", list(ELEMENTWISE))
def test_an_elementwise_function_passes_on_the_names_of_its_operand(name):
    points = hook_points(Functional(ELEMENTWISE[name]), torch.randn(2, 3, 9, 8))
    assert points["after"].axes == IMAGE


MOVES_AXES = {
    "transpose of equal lengths": lambda x: x.transpose(2, 3),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "flip": lambda x: x.flip(2),
    "reshape": lambda x: x.reshape(x.shape[0], 7, 4, 7),
    "roll": lambda x: x.roll(1, 2),
    "matmul": lambda x: x @ torch.randn(7, 7),
    "sum over an axis": lambda x: x.sum(1),
}


@pytest.mark.parametrize("name", list(MOVES_AXES))
def test_a_function_that_moves_axes_leaves_them_unnamed_but_for_the_proved_batch(name):
    point = hook_points(Functional(MOVES_AXES[name]), torch.randn(2, 3, 9, 9))["after"]
    assert point.axes == (B, *(f"axis{number}" for number in range(1, len(point.axes))))


class Reshaped(nn.Module):
    """Four axes that no module type names: not every tensor of four axes is an image."""

    def __init__(self):
        super().__init__()
        self.heads = Heads()

    def forward(self, sequence):
        return self.heads(sequence)


class Heads(nn.Module):
    def forward(self, sequence):
        return sequence.unflatten(-1, (2, 3)).transpose(1, 2)


def test_axes_are_never_guessed_from_how_many_there_are():
    points = hook_points(Reshaped(), torch.randn(2, 5, 6))
    assert points["heads"].axes == (B, "axis1", "axis2", "axis3")


def test_flatten_over_some_axes_names_only_what_it_made():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))
    assert hook_points(model, torch.randn(2, 3, 9, 8))["1"].axes == (B, C, "feature")


def test_a_linear_layer_keeps_the_leading_names_of_its_input():
    model = nn.Sequential(nn.GRU(6, 4, batch_first=True), Pick(), nn.Linear(4, 2))
    assert hook_points(model, torch.randn(2, 5, 6))["2"].axes == (B, "position", "feature")


class Pick(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_convolution_names_its_input_too(plain_cnn, name):
    points = hook_points(plain_cnn.module, *plain_cnn.inputs(2))
    assert points[f"{name}.in[0]"].axes == IMAGE


def test_a_mask_given_to_attention_is_not_named_after_its_sequence():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    points = hook_points(layer, torch.randn(2, 5, 6), src_mask=torch.zeros(5, 5))
    assert points['.in["src_mask"]'].axes == ("axis0", "axis1")


def test_no_names_of_the_input_make_no_names_of_an_elementwise_output():
    assert axis_names(nn.ReLU(), "out", (), 4, None) == (None,) * 4


def test_the_second_item_of_an_adaptive_pool_with_indices_has_the_names_of_the_first():
    pool = nn.MaxPool2d(2, return_indices=True)
    assert axis_names(pool, "out", (Item(1),), 4, None) == IMAGE


def test_packed_sequences_have_no_axis_names():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    points = hook_points(nn.LSTM(6, 4), packed)
    assert points[".in[0].data"].axes == points[".out[0].data"].axes == ("axis0", "axis1")
    assert points[".in[0].batch_sizes"].axes == ("axis0",)
    assert points[".out[1][0]"].axes == ("layer", B, "feature")


def test_a_sequence_given_to_an_lstm_by_keyword_is_named_as_one_given_by_position():
    points = hook_points(nn.LSTM(6, 4, batch_first=True), input=torch.randn(2, 5, 6))
    assert points['.in["input"]'].axes == (B, "position", "feature")
