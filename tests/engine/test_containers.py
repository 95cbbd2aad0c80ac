"""Containers that a module writes into: the caller sees what was patched there, and misses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from chanpatch import PatchedPolicy, hook_points, patched, sweep, zero_ablate
from chanpatch.errors import UnsupportedModelError


class Encoder(nn.Module):
    """Writes what it computes into the dict it is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, batch):
        batch["hidden"] = self.linear(batch["x"]).relu()
        return batch


class FilledDict(nn.Module):
    """Ignores what the encoder returns, as the dict is at hand."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        batch = {"x": x}
        self.encoder(batch)
        return self.head(batch["hidden"]) + batch["x"][:, :2]


class UsersDict(FilledDict):
    """The same with a dict of the user's."""

    def forward(self, batch):
        self.encoder(batch)
        batch["logits"] = self.head(batch["hidden"]) + batch["x"][:, :2]
        return batch


class Block(nn.Module):
    """Appends to a list that goes through the model, as losses do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, losses):
        x = self.linear(x)
        losses.append(x.square().mean(1))
        return x


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        losses = []
        self.second(self.first(x, losses), losses)
        assert len(losses) == 2
        return losses[0] + 10 * losses[1]


@dataclass
class State:
    x: torch.Tensor
    hidden: torch.Tensor | None = None


class StateEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, state):
        state.hidden = self.linear(state.x)
        return state


class FilledDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = StateEncoder()

    def forward(self, x):
        state = State(x)
        self.encoder(state)
        return state.hidden.sum(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


X = torch.linspace(-1, 1, 36).view(9, 4)


def by_hand(model, module, hook, *inputs):
    handle = model.get_submodule(module).register_forward_hook(hook)
    try:
        return model(*inputs)
    finally:
        handle.remove()


def zero_hidden(_, __, output):
    output["hidden"] = torch.zeros_like(output["hidden"])


def test_what_is_patched_in_a_dict_that_the_caller_holds_is_what_it_reads():
    model = FilledDict()
    points = hook_points(model, X)
    patch = zero_ablate(points.site('encoder.out["hidden"]'))
    expected = by_hand(model, "encoder", zero_hidden, X)
    with patched(points, patch):
        assert torch.equal(model(X), expected)
    assert torch.equal(PatchedPolicy(points, patch)(X), expected)
    assert not torch.allclose(model(X), expected)


def test_a_sweep_over_such_a_dict_has_the_effects_of_hooks_written_by_hand():
    model = FilledDict()
    points = hook_points(model, X)
    sites = points.site('encoder.out["hidden"]').split("feature")
    result = sweep(points, X, patches=[zero_ablate(site) for site in sites], metric=lambda output: output[:, 0])
    for feature, row in enumerate(result.values["metric"]):

        def zero(_, __, output, feature=feature):
            output["hidden"] = output["hidden"].index_fill(1, torch.tensor([feature]), 0)

        torch.testing.assert_close(torch.from_numpy(row).float(), by_hand(model, "encoder", zero, X)[:, 0])
    assert np.count_nonzero(result.effect("metric")) > 3


def test_a_dataclass_that_the_caller_holds_is_patched_too():
    model = FilledDataclass()
    points = hook_points(model, X)
    with patched(points, zero_ablate(points.site("encoder.out.hidden"))):
        assert not model(X).any()


def test_the_users_own_tensor_in_the_users_own_dict_stays():
    model = UsersDict()
    points = hook_points(model, {"x": X})
    batch = {"x": X}
    with patched(points, zero_ablate(points.site('encoder.out["x"]'))):
        model(batch)
    assert batch["x"] is X


def test_a_users_dict_is_filled_as_without_patches():
    model = UsersDict()
    points = hook_points(model, {"x": X})
    batch = {"x": X}
    with patched(points, zero_ablate(points.site('encoder.out["hidden"]'))):
        output = model(batch)
    assert output is batch
    assert not batch["hidden"].any()
    assert torch.equal(batch["logits"], by_hand(model, "encoder", zero_hidden, {"x": X})["logits"])


WRITES = (
    "This {} writes to its input {}, in which a tensor is patched. The patch applies to a copy of the input, so the "
    "caller would not see the writes. Patch the module that computes the tensor instead, or patch inside this module."
)


class Counting(nn.Module):
    """Writes beside the fields of a dataclass."""

    def forward(self, state):
        state.extra = state.x + 1


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.counting = Counting()

    def forward(self, x):
        state = State(x)
        self.counting(state)
        return state.extra + state.x


WRITING = {
    'encoder.in[0]["x"]': (FilledDict, WRITES.format("Encoder", "dict")),
    "second.in[1][0]": (Losses, WRITES.format("Block", "list")),
    "counting.in[0].x": (Counted, WRITES.format("Counting", "State")),
}


@pytest.mark.parametrize("site", WRITING)
def test_a_patch_in_a_container_that_the_module_writes_into_is_refused(site):
    kind, message = WRITING[site]
    model = kind()
    points, expected = hook_points(model, X), model(X)
    with patched(points, zero_ablate(points.site(site)), allow_unreached=site):
        with pytest.raises(UnsupportedModelError) as caught:
            model(X)
    assert str(caught.value) == message
    assert torch.equal(model(X), expected)


def test_the_users_tensor_in_a_dict_of_the_models_own_is_patched_for_the_caller():
    model = FilledDict()
    points = hook_points(model, X)
    with patched(points, zero_ablate(points.site('encoder.out["x"]'))):
        assert torch.equal(model(X), model.head(model.encoder.linear(X).relu()))


class Both(nn.Module):
    def forward(self, one, other):
        return one["x"] + other["x"]


class Twice(nn.Module):
    """Gives one dict as two arguments."""

    def __init__(self):
        super().__init__()
        self.both = Both()

    def forward(self, x):
        batch = {"x": x}
        return self.both(batch, batch) + 0 * batch["x"]


@pytest.mark.parametrize("place", ["0", "1"])
def test_a_dict_that_is_given_twice_stays_one(place):
    model = Twice()
    points = hook_points(model, X)
    with patched(points, zero_ablate(points.site(f'both.in[{place}]["x"]'))):
        assert not model(X).any()
