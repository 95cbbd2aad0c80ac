"""A model that was not traced has the axis names of a trace from its first forward on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import PatchedPolicy, Site, edit, hook_points, patched, recording, zero_ablate
from chanpatch.errors import SiteError


class Counted(nn.Module):
    """A network whose activation functions have no axis names of their own, and a count of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(16, 2)
        self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        counts.append(len(images))
        return self.head(self.relu(self.conv(images)).flatten(1))

    def values(self, images: Tensor) -> Tensor:
        return self(images)[:, 0]


counts: list[int] = []


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 4, 4)


@pytest.fixture
def model() -> Counted:
    counts.clear()
    return Counted()


def by_hand(model: Counted, images: Tensor) -> Tensor:
    activation = model.conv(images).relu()
    activation[:, 2] = 0
    return model.head(activation.flatten(1))


PATCH = zero_ablate(Site("relu", channel=2))


def test_a_channel_of_a_relu_after_a_convolution_is_patched(model: Counted, images: Tensor) -> None:
    with patched(model, PATCH) as ledger:
        found = model(images)
    torch.testing.assert_close(found, by_hand(model, images))
    assert ledger.to_records()[0]["rows"] == 5


def test_the_model_is_traced_once_for_all_later_contexts(model: Counted, images: Tensor) -> None:
    for _ in range(3):
        with patched(model, PATCH):
            model(images)
    assert counts == [5, 5, 6, 5, 5]  # the trace and its run with one row more are in the first forward


def test_a_module_whose_type_names_its_axes_needs_no_trace(model: Counted, images: Tensor) -> None:
    with patched(model, zero_ablate(Site("conv", channel=2))), recording(model, "conv", "sum") as cache:
        model(images)
    assert counts == [5]
    assert not cache["conv"][:, 2].any()


def test_the_sums_of_the_channels_of_a_relu_are_recorded(model: Counted, images: Tensor) -> None:
    with recording(model, "relu", "sum") as cache:
        model(images)
    torch.testing.assert_close(cache["relu"], model.conv(images).relu().sum((2, 3)))


def test_an_edit_that_asks_for_rows_gets_them(model: Counted, images: Tensor) -> None:
    rows = []

    def note(activation: Tensor, *, context: Any) -> Tensor:
        rows.append(context.rows.tolist())
        return activation

    with patched(model, edit(Site("relu"), note)):
        model(images)
    assert rows == [[0, 1, 2, 3, 4]]


def test_a_twin_has_them_in_its_forward_and_in_its_other_methods(model: Counted, images: Tensor) -> None:
    for method in ("__call__", "values"):
        twin = PatchedPolicy(model, PATCH)
        found = getattr(twin, method)(images)
        expected = by_hand(model, images)
        torch.testing.assert_close(found, expected if method == "__call__" else expected[:, 0])
        assert [record["firings"] for record in twin.ledger.to_records()] == [1]


def test_contexts_that_are_open_around_it_count_their_own_forward_only(model: Counted, images: Tensor) -> None:
    points = hook_points(model, images)
    outer = edit(points.site("conv"), lambda activation: activation + 1)
    with patched(points, outer) as around, recording(points, "head") as cache, patched(model, PATCH):
        found = model(images)
    activation = (model.conv(images) + 1).relu()
    activation[:, 2] = 0
    torch.testing.assert_close(found, model.head(activation.flatten(1)))
    assert [record["firings"] for record in around.to_records()] == [1]
    assert len(cache["head"]) == 5


def test_a_name_that_a_trace_does_not_have_either_is_an_error_that_shows_those_it_has(
    model: Counted, images: Tensor
) -> None:
    with pytest.raises(SiteError) as caught, patched(model, zero_ablate(Site("relu", chanel=2))):
        model(images)
    assert str(caught.value) == (
        "Site('relu', chanel=2): there is no axis 'chanel' (did you mean 'channel'?); hook point 'relu' has axes "
        "(batch, channel, row, col)."
    )


def test_an_input_of_the_model_itself_has_a_batch_axis(model: Counted, images: Tensor) -> None:
    with patched(model, zero_ablate(Site(".in[0]", batch=2))) as ledger:
        found = model(images)
    images[2] = 0
    torch.testing.assert_close(found, model(images))
    assert ledger.to_records()[0]["rows"] == 1


@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_trace_inside_a_forward_pass_changes_no_gradient(is_autocast: bool) -> None:
    grads = []
    for axis in ("batch", "axis0"):  # only "batch" needs a trace
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
            patched(model, zero_ablate(Site("2", **{axis: 0}))),
        ):
            model(x).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    assert all(grad is not None for grad in grads[0])
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)
