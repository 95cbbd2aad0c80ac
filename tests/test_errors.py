"""What chanpatch says when something is wrong, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor, nn

from chanpatch import (
    ActivationCache,
    HookPoints,
    Patch,
    PatchedPolicy,
    Site,
    edit,
    errors,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    recording,
    resample_ablate,
    run_with_cache,
    steer,
    tap,
    zero_ablate,
)
from chanpatch.edits import Clamp
from chanpatch.policies import action_distribution

CNN = build("plain_cnn")
POINTS = hook_points(CNN.module, *CNN.inputs(4))
SHARED = build("shared_module")
SHARED_POINTS = hook_points(SHARED.module, *SHARED.inputs(2))


class Branching(nn.Module):
    """Calls `left` for positive inputs and `right` otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, vector: Tensor) -> Tensor:
        return self.left(vector) if vector.sum() > 0 else self.right(vector)


BRANCHING = Branching()
BRANCHING_POINTS = hook_points(BRANCHING, torch.ones(2, 2))


def run(points_or_model: HookPoints | nn.Module, *patches: Patch) -> None:
    with torch.no_grad(), patched(points_or_model, patches):
        CNN.module(*CNN.inputs(4))


def tapped() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, vector: Tensor) -> Tensor:
            return tap("fc", self.fc(vector))

    hook_points(Tapped(), torch.zeros(1, 2))


def run_branching_the_other_way() -> None:
    with patched(BRANCHING_POINTS, zero_ablate(BRANCHING_POINTS.site("left"))):
        BRANCHING(-torch.ones(2, 2))


def record_the_other_way() -> None:
    run_with_cache(BRANCHING_POINTS, -torch.ones(2, 2), sites="left")


def call_twin_the_other_way() -> None:
    PatchedPolicy(BRANCHING_POINTS, zero_ablate(BRANCHING_POINTS.site("left")))(-torch.ones(2, 2))


def cache() -> ActivationCache:
    return run_with_cache(POINTS, *CNN.inputs(2), sites="relu1", stop=True)  # type: ignore[no-any-return]


class NoForward(nn.Module):
    pass


FC = "Did you mean 'fc'? (3 modules; hook_points(model, *inputs) lists every hook point, taps included.)"

MESSAGES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "unknown name": (
        errors.HookPointError,
        lambda: POINTS.site("relu_1", channel=1),
        "No hook point named 'relu_1'. Did you mean 'relu1'? (12 hook points; print the HookPoints to list them.)",
    ),
    "unknown name in a small model": (
        errors.HookPointError,
        lambda: BRANCHING_POINTS["middle"],
        "No hook point named 'middle'. (Hook points that fired: .in[0], left.in[0], left, .out.)",
    ),
    "a module that was not called": (
        errors.HookPointError,
        lambda: BRANCHING_POINTS.site("right"),
        "Hook point 'right' never fired: the traced forward did not call that module. (Hook points that fired: .in[0], "
        "left.in[0], left, .out.) To trace another path, pass its inputs or its method to hook_points().",
    ),
    "a module that was called twice": (
        errors.HookPointError,
        lambda: SHARED_POINTS.site("relu"),
        "'relu' is 4 hook points: relu#0.in[0], relu#0, relu#1.in[0], relu#1. Name one of them.",
    ),
    "a pattern without matches": (
        errors.HookPointError,
        lambda: POINTS.select("block*"),
        "No hook point matches 'block*'. (12 hook points; print the HookPoints to list them.)",
    ),
    "unknown name in a bare model": (
        errors.HookPointError,
        lambda: recording(nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), "fcc").__enter__(),
        f"No hook point named 'fcc'. {FC}",
    ),
    "several faults": (
        errors.HookPointError,
        lambda: run(POINTS, zero_ablate(Site("conv_1")), zero_ablate(Site("conv1", channel=8))),
        "2 faults:\n"
        "- No hook point named 'conv_1'. Did you mean 'conv1'? (12 hook points; print the HookPoints to list them.)\n"
        "- Site('conv1', channel=8): channel 8 is out of range; hook point 'conv1' has axes (batch, channel, row, col) "
        "and 8 channels (0 to 7).",
    ),
    "index out of range": (
        errors.SiteError,
        lambda: POINTS.site("conv1", channel=64),
        "Site('conv1', channel=64): channel 64 is out of range; hook point 'conv1' has axes (batch, channel, row, col) "
        "and 8 channels (0 to 7).",
    ),
    "unknown axis": (
        errors.SiteError,
        lambda: POINTS.site("conv1", chanel=3),
        "Site('conv1', chanel=3): there is no axis 'chanel' (did you mean 'channel'?); hook point 'conv1' has axes "
        "(batch, channel, row, col).",
    ),
    "an index named twice": (
        errors.SiteError,
        lambda: POINTS.site("conv1", channel=[7, -1]),
        "Site('conv1', channel=[7, -1]): channel 7 is named twice; hook point 'conv1' has axes (batch, channel, row, "
        "col) and 8 channels (0 to 7).",
    ),
    "an empty index": (
        errors.SiteError,
        lambda: Site("conv1", channel=[]),
        "Site('conv1', channel=[]) selects nothing. Leave channel out to mean all of it.",
    ),
    "no index": (
        errors.SiteError,
        lambda: Site("conv1", channel=1.5),
        "Site('conv1', channel=1.5): an index is an int, a slice, a sequence of ints or a boolean mask.",
    ),
    "an axis without a known length": (
        errors.SiteError,
        lambda: Site("conv1").split("channel"),
        "Site('conv1') cannot be split along 'channel': the length of that axis is not known. Name its indices, or "
        "take the site from points.site(...) of a traced model.",
    ),
    "an operand that would broadcast": (
        errors.EditError,
        lambda: run(CNN.module, steer(Site("conv1"), torch.zeros(8))),
        "Add at Site('conv1'): the vector has shape (8,), but the region has axes (batch, channel, row, col) = (4, 8, "
        "8, 8). Give every axis, with length 1 where the vector repeats: vector.view(1, 8, 1, 1) adds along channel.",
    ),
    "an operand of another dtype": (
        errors.EditError,
        lambda: steer(POINTS.site("conv1"), torch.zeros(1, 8, 1, 1, dtype=torch.float64)),
        "Add at Site('conv1'): the vector is torch.float64 on cpu, but the region is torch.float32 on cpu. Convert it: "
        "vector.to('cpu', torch.float32).",
    ),
    "an operand on another device": (
        errors.EditError,
        lambda: steer(POINTS.site("conv1"), torch.zeros(1, 8, 1, 1, device="meta")),
        "Add at Site('conv1'): the vector is torch.float32 on meta, but the region is torch.float32 on cpu. Convert "
        "it: vector.to('cpu', torch.float32).",
    ),
    "a mask that would broadcast": (
        errors.EditError,
        lambda: zero_ablate(POINTS.site("fc"), where=torch.ones(4, dtype=torch.bool)),
        "where at Site('fc'): the mask has shape (4,), but the region has axes (batch, feature) = (any, 4). Give every "
        "axis, with length 1 where the mask repeats: mask.view(1, 4) selects along feature.",
    ),
    "a mask that is none": (
        errors.EditError,
        lambda: zero_ablate(POINTS.site("fc"), where=torch.ones(1, 4)),
        "where at Site('fc') is a torch.float32 tensor, but it takes a bool tensor, as in mask = column < 12.",
    ),
    "an edit that returns None": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), print_nothing)),
        "Patch(Site('fc'), print_nothing) returned NoneType. An edit returns a tensor: the new activation, or the one "
        "it got to change nothing.",
    ),
    "an edit that returns another shape": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), first_rows)),
        "Patch(Site('fc'), first_rows) returned shape (1, 4), but the region has shape (4, 4) (axes batch, feature).",
    ),
    "an edit that returns another dtype": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), doubled)),
        "Patch(Site('fc'), doubled) returned dtype torch.float64, but the region has dtype torch.float32.",
    ),
    "an edit that writes in place": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), emptied)),
        "Patch(Site('fc'), emptied) wrote into its region in place. Return a new tensor: activation * 0 instead of "
        "activation.mul_(0).",
    ),
    "an edit that brings NaN in": (
        errors.NaNError,
        lambda: run(POINTS, edit(POINTS.site("fc"), divided)),
        "Patch(Site('fc'), divided) brought NaN into a region that had none. Check its operands (a mean over no rows, "
        "0/0), or pass check_nan=False if NaN is meant.",
    ),
    "an edit that is none": (
        errors.EditError,
        lambda: edit(POINTS.site("fc"), 0.0),  # type: ignore[arg-type]
        "The edit at Site('fc') is float, which cannot be called. Use Set(value) to put a value there, or a function "
        "activation -> activation.",
    ),
    "bounds that are crossed": (
        errors.EditError,
        lambda: Clamp(low=1.0, high=0.0),
        "Clamp(low=1.0, high=0.0): the lower bound is above the upper one.",
    ),
    "a mean over an axis that is not there": (
        errors.SiteError,
        lambda: mean_ablate(POINTS.site("fc"), torch.zeros(3, 4), over=("channel",)),
        "mean_ablate over ['channel'] at Site('fc'): its axes are (batch, feature).",
    ),
    "a cache without the site": (
        errors.EditError,
        lambda: patch_in(POINTS.site("fc"), cache()),
        "The cache holds neither Site('fc') nor its whole hook point. It holds Site('relu1').",
    ),
    "a key that the cache lacks": (
        errors.HookPointError,
        lambda: cache()["fc"],
        "The cache has no 'fc'. It holds Site('relu1').",
    ),
    "caches of different sites": (
        errors.SiteError,
        lambda: cache() - run_with_cache(POINTS, *CNN.inputs(2), sites="fc", stop=True),
        "Caches of different sites cannot be combined: Site('fc'), Site('relu1') is in one of them only.",
    ),
    "a reduction that cannot tell its axes": (
        errors.SiteError,
        lambda: recording(
            hook_points(build("attention").module, torch.zeros(2, 5, 6)), ".out", reduce="sum"
        ).__enter__(),
        "reduce='sum' at Site('.out') keeps batch, channel and feature, but the axes (batch, axis1) have no such "
        "names. Name them, hook_points(..., axes={'.out': (...)}), or give an einops pair.",
    ),
    "rows without a batch axis": (
        errors.BatchAxisError,
        lambda: resample_ablate(hook_points(nn.Linear(2, 2), torch.zeros(2)).site(".out"), torch.zeros(3, 2), seed=0),
        "resample_ablate at Site('.out') needs rows. The trace could not prove which axis of '.out' is the batch: no "
        "single axis grew when the model was run with one row more. Name it where the inputs have it: hook_points(..., "
        "axes={'.in[0]': (...)}).",
    ),
    "a patch that never ran": (
        errors.UnreachedError,
        run_branching_the_other_way,
        "The patch at 'left' never ran inside patched(). The model was compiled, or 'left' is not on the path that was "
        "called.",
    ),
    "a record that never ran": (
        errors.UnreachedError,
        record_the_other_way,
        "Nothing was recorded at 'left' inside run_with_cache(). The model was compiled, or it is not on the path that "
        "was called.",
    ),
    "a twin's patch that never ran": (
        errors.UnreachedError,
        call_twin_the_other_way,
        "The patch at 'left' never ran in __call__(). The model was compiled, or 'left' is not on the path that was "
        "called. If it need not run there: allow_unreached=['left'].",
    ),
    "a tap with a module's name": (
        errors.HookPointError,
        tapped,
        "tap('fc', ...) has the name of a module. Give the tap a name of its own.",
    ),
    "no axis names that fit": (
        errors.SiteError,
        lambda: hook_points(CNN.module, *CNN.inputs(1), axes={"fc": ("batch",)}),
        "axes={'fc': ('batch',)}: hook point 'fc' has 2 axes; give each one name of its own.",
    ),
    "no policy": (
        errors.DistributionError,
        lambda: action_distribution(NoForward(), torch.zeros(1)),
        "NoForward has no forward. Pass the function that gives its logits or distribution, such as lambda "
        "observations: agent.actor(observations).",
    ),
    "no distribution": (
        errors.DistributionError,
        lambda: action_distribution(lambda observations: {"q": observations}, torch.zeros(1)),
        "function returned a dict of 'q', which holds no action distribution: expected a torch.distributions object, "
        "logits (batch, action), a tuple that begins with one of them, or a dict with 'logits'. Pass a function that "
        "picks it out.",
    ),
}


def print_nothing(activation: Tensor) -> None:
    return None


def first_rows(activation: Tensor) -> Tensor:
    return activation[:1]


def doubled(activation: Tensor) -> Tensor:
    return activation.double()


def emptied(activation: Tensor) -> Tensor:
    return activation.mul_(0)


def divided(activation: Tensor) -> Tensor:
    return activation * 0 / 0


@pytest.mark.parametrize("name", MESSAGES)
def test_the_message_says_what_is_wrong_what_was_expected_and_what_to_do(name: str) -> None:
    kind, fails, message = MESSAGES[name]
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_every_error_is_in_the_tree_that_the_docstring_draws() -> None:
    drawn = set(re.findall(r"\b(\w+Error)\b", errors.__doc__ or ""))
    defined = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    builtin = {
        base.__name__ for name in defined for base in vars(errors)[name].__mro__ if base.__module__ == "builtins"
    }
    assert drawn - builtin == defined - builtin
    for name in defined:
        assert issubclass(vars(errors)[name], errors.ChanpatchError)


def test_an_output_that_turned_from_a_tuple_into_a_tensor_is_not_indexed_as_if_it_were_one() -> None:
    class Sometimes(nn.Module):
        def forward(self, vector: Tensor) -> Any:
            return (vector, vector) if vector.sum() > 0 else vector

    model = nn.Sequential(Sometimes())
    points = hook_points(model, torch.ones(2, 2))
    with pytest.raises(errors.TraceMismatchError) as caught, patched(points, zero_ablate(points.site("0.out[0]"))):
        model(-torch.ones(2, 2))
    assert str(caught.value) == (
        "There is no tensor at hook point '0.out[0]' in this forward, but NoneType in Tensor. Trace inputs like these "
        "with hook_points() and use the names it lists."
    )
