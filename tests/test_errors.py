"""What chanpatch says when something is wrong, word for word."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.masked import masked_tensor

from chanpatch import (
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
    sweep,
    tap,
    zero_ablate,
)
from chanpatch.engine.paths import Attr, Item, replace
from chanpatch.errors import ChanpatchError
from chanpatch.patching import ActivationCache, Clamp, Project, Resample, Set
from chanpatch.policies import action_distribution
from chanpatch.registry.sites import read

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


def run_in_bfloat16(points: HookPoints) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        run_with_cache(points, *CNN.inputs(2), sites="fc")


class Halved(Categorical):
    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits / 2, validate_args=validate_args)


def tapped(name: str = "fc") -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, vector: Tensor) -> Tensor:
            return tap(name, self.fc(vector))

    hook_points(Tapped(), torch.zeros(1, 2))


def run_branching_the_other_way(*names: str) -> None:
    with patched(BRANCHING_POINTS, [zero_ablate(BRANCHING_POINTS.site(name)) for name in names]):
        BRANCHING(-torch.ones(2, 2))


def record_the_other_way() -> None:
    run_with_cache(BRANCHING_POINTS, -torch.ones(2, 2), sites="left")


def call_twin_the_other_way() -> None:
    PatchedPolicy(BRANCHING_POINTS, zero_ablate(BRANCHING_POINTS.site("left")))(-torch.ones(2, 2))


def cache() -> ActivationCache:
    return run_with_cache(POINTS, *CNN.inputs(2), sites="relu1", stop=True)  # type: ignore[no-any-return]


def open_and_close() -> None:
    with patched(POINTS, zero_ablate(POINTS.site("fc"))):
        pass


def run_shared_without_a_trace() -> None:
    with patched(SHARED.module, zero_ablate(Site("relu"))):
        SHARED.module(*SHARED.inputs(2))


def run_identity(tensor: Tensor, patch: Patch) -> None:
    with patched(model := nn.Identity(), patch):
        model(tensor)


class Algorithm:
    """Holds its policy, as those of Stable-Baselines3 do."""

    def __init__(self) -> None:
        self.seed, self.policy = 0, CNN.module


class Merging(nn.Linear):
    merged = False

    def train(self, mode: bool = True) -> Merging:
        self.weight.data += -1 if mode else 1
        return super().train(mode)


def call_twin_of_merged() -> None:
    policy = nn.Linear(2, 2)
    policy.merged = False
    twin = PatchedPolicy(policy, zero_ablate(Site(".out")))
    policy.merged = True
    twin(torch.zeros(1, 2))


class NoForward(nn.Module):
    pass


MESSAGES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "unknown name": (
        errors.HookPointError,
        lambda: POINTS.site("relu_1", channel=1),
        "No hook point named 'relu_1'. Did you mean 'relu1'? (12 hook points; print the HookPoints to list them.)",
    ),
    "unknown name in a small model": (
        errors.HookPointError,
        lambda: BRANCHING_POINTS["middle"],
        "No hook point named 'middle'. (The hook points are .in[0], left.in[0], left, .out.)",
    ),
    "a module that was not called": (
        errors.HookPointError,
        lambda: BRANCHING_POINTS.site("right"),
        "'right' is not a hook point, because the traced forward pass did not call that module. (The hook points are "
        ".in[0], left.in[0], left, .out.) To trace another path through the model, call hook_points() with other "
        "inputs or another method.",
    ),
    "a module that was called twice": (
        errors.HookPointError,
        lambda: SHARED_POINTS.site("relu"),
        "'relu' does not identify a hook point. Use one of these names: relu#0.in[0], relu#0, relu#1.in[0], relu#1.",
    ),
    "a pattern without matches": (
        errors.HookPointError,
        lambda: POINTS.select("block*"),
        "No hook point matches 'block*'. `*` stops at a dot; `**` does not. (12 hook points; print the HookPoints to "
        "list them.)",
    ),
    "unknown name in a bare model": (
        errors.HookPointError,
        lambda: recording(nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), "fcc").__enter__(),
        "No hook point named 'fcc'. Did you mean 'fc'? To list all hook points, including taps, print "
        "hook_points(model, *inputs).",
    ),
    "several faults": (
        errors.HookPointError,
        lambda: run(POINTS, zero_ablate(Site("conv_1")), zero_ablate(Site("conv1", channel=8))),
        "2 errors:\n"
        "- No hook point named 'conv_1'. Did you mean 'conv1'? (12 hook points; print the HookPoints to list them.)\n"
        "- Site('conv1', channel=8): channel 8 is out of range; hook point 'conv1' has axes (batch, channel, row, "
        "col) and 8 channels (0 to 7).",
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
    "a key that is a tuple": (
        TypeError,
        lambda: cache()["resid_post", 1],
        "A cache's key must be a site, a hook point or a name, as in cache['conv1']; got ('resid_post', 1).",
    ),
    "a function that selects names": (
        TypeError,
        lambda: run_with_cache(POINTS, *CNN.inputs(2), sites=lambda name: True),
        "sites= must be a name, a pattern, a site, a hook point or a list of these; got function.",
    ),
    "an index named twice": (
        errors.SiteError,
        lambda: POINTS.site("conv1", channel=[7, -1]),
        "Site('conv1', channel=[7, -1]): channel 7 is listed twice; hook point 'conv1' has axes (batch, channel, row, "
        "col) and 8 channels (0 to 7).",
    ),
    "an empty index": (
        errors.SiteError,
        lambda: Site("conv1", channel=[]),
        "Site('conv1', channel=[]) selects nothing. Omit channel to select the whole axis.",
    ),
    "no index": (
        errors.SiteError,
        lambda: Site("conv1", channel=1.5),
        "Site('conv1', channel=1.5): an index must be an int, a slice, a label, a list of ints or labels, or a boolean "
        "mask.",
    ),
    "an axis without a known length": (
        errors.SiteError,
        lambda: Site("conv1").split("channel"),
        "Site('conv1') cannot be split along 'channel': the length of that axis is unknown. Pass indices, or create "
        "the site with points.site(...).",
    ),
    "an operand that would broadcast": (
        errors.EditError,
        lambda: run(CNN.module, steer(Site("conv1"), torch.zeros(8))),
        "Add at Site('conv1'): the vector has shape (8,), but the region has axes (batch, channel, row, col) = (4, 8, "
        "8, 8). Each axis of the vector must have the region's length or length 1. For example, vector.view(1, 8, 1, "
        "1) adds along the 'channel' axis.",
    ),
    "an operand of another dtype": (
        errors.EditError,
        lambda: steer(POINTS.site("conv1"), torch.zeros(1, 8, 1, 1, dtype=torch.float64)),
        "Add at Site('conv1'): the vector is torch.float64 on cpu, but the region is torch.float32 on cpu. Convert "
        "the vector: vector.to('cpu', torch.float32).",
    ),
    "an operand on another device": (
        errors.EditError,
        lambda: steer(POINTS.site("conv1"), torch.zeros(1, 8, 1, 1, device="meta")),
        "Add at Site('conv1'): the vector is torch.float32 on meta, but the region is torch.float32 on cpu. Convert "
        "the vector: vector.to('cpu', torch.float32).",
    ),
    "a mask that would broadcast": (
        errors.EditError,
        lambda: zero_ablate(POINTS.site("fc"), where=torch.ones(4, dtype=torch.bool)),
        "`where` at Site('fc'): the mask has shape (4,), but the region has axes (batch, feature) = (any, 4). Each "
        "axis of the mask must have the region's length or length 1. For example, mask.view(1, 4) selects along "
        "the 'feature' axis.",
    ),
    "a mask that is none": (
        errors.EditError,
        lambda: zero_ablate(POINTS.site("fc"), where=torch.ones(1, 4)),
        "`where` at Site('fc') must be a bool tensor (such as column < 12) or a function that returns a bool tensor; "
        "got a torch.float32 tensor.",
    ),
    "an edit that returns None": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), print_nothing)),
        "The edit in Patch(Site('fc'), print_nothing) returned NoneType. An edit must return a tensor: either a new "
        "activation or, to change nothing, the activation that was passed to the edit.",
    ),
    "an edit that returns another shape": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), first_rows)),
        "The edit in Patch(Site('fc'), first_rows) returned a tensor with shape (1, 4). An edit must return a tensor "
        "with the region's shape: (4, 4) (axes batch, feature).",
    ),
    "an edit that returns another dtype": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), doubled)),
        "The edit in Patch(Site('fc'), doubled) returned a tensor with dtype torch.float64. An edit must return a "
        "tensor with the region's dtype: torch.float32.",
    ),
    "an edit that writes in place": (
        errors.EditError,
        lambda: run(POINTS, edit(POINTS.site("fc"), emptied)),
        "The edit in Patch(Site('fc'), emptied) modified the activation in place. Return a new tensor, such as "
        "activation * 0 instead of activation.mul_(0).",
    ),
    "an edit that brings NaN in": (
        errors.NaNError,
        lambda: run(POINTS, edit(POINTS.site("fc"), divided)),
        "Patch(Site('fc'), divided) introduced NaN: at least one element is NaN only with the patch. Check whether a "
        "tensor in the edit was computed as 0/0 or as a mean over zero rows. If NaN is intended, pass check_nan=False "
        "to patched(), sweep() or PatchedPolicy.",
    ),
    "an edit that is none": (
        errors.EditError,
        lambda: edit(POINTS.site("fc"), 0.0),  # type: ignore[arg-type]
        "The edit at Site('fc') must be callable; got float. Use Set(value) to set the activation to a value, or a "
        "function that maps the activation to a new activation.",
    ),
    "bounds that are crossed": (
        errors.EditError,
        lambda: Clamp(low=1.0, high=0.0),
        "Clamp(low=1.0, high=0.0): low must not be above high.",
    ),
    "an operand that is none": (
        errors.EditError,
        lambda: Set([1.0]),  # type: ignore[arg-type]
        "Set: the value must be a real number (int or float) or a tensor; got list.",
    ),
    "a bound that is no number": (
        errors.EditError,
        lambda: Clamp(low="a"),  # type: ignore[arg-type]
        "Clamp: the lower bound must be a real number (int or float) or None; got 'a'.",
    ),
    "a fraction in an integer region": (
        errors.EditError,
        lambda: Patch(hook_points(nn.Identity(), torch.arange(2)).site(".out"), Set(2.7)),
        "Set at Site('.out'): the value must be an integer from -9223372036854775808 to 9223372036854775807, because "
        "the region's dtype is torch.int64; got 2.7.",
    ),
    "a direction of zeros": (
        errors.EditError,
        lambda: Project(torch.zeros(1, 4)),
        "Project: the direction is zero. Pass a tensor with at least one nonzero element.",
    ),
    "a direction that is none": (
        errors.EditError,
        lambda: Project(3.0),  # type: ignore[arg-type]
        "Project: the direction must be a tensor; got 3.0.",
    ),
    "a seed that is none": (
        errors.EditError,
        lambda: resample_ablate(POINTS.site("fc"), torch.zeros(2, 4), seed=0.7),  # type: ignore[arg-type]
        "Resample: the seed must be an integer; got 0.7.",
    ),
    "a draw per something else": (
        errors.EditError,
        lambda: resample_ablate(POINTS.site("fc"), torch.zeros(2, 4), per="wave"),  # type: ignore[arg-type]
        "Resample: per must be 'episode' or 'step'; got 'wave'.",
    ),
    "no rows to draw from": (
        errors.EditError,
        lambda: resample_ablate(POINTS.site("fc"), torch.zeros(0, 4), seed=0),
        "Resample: the reference must have at least one row along batch_axis=0; got shape (0, 4).",
    ),
    "rows drawn along another axis": (
        errors.EditError,
        lambda: Patch(POINTS.site("fc"), Resample(torch.zeros(1, 4), seed=0, batch_axis=1)),
        "Resample at Site('fc') has batch_axis=1, but the batch is axis 0 of (batch, feature). Use "
        "Resample(reference, seed, batch_axis=0).",
    ),
    "a mean over nothing": (
        errors.SiteError,
        lambda: mean_ablate(POINTS.site("fc"), torch.zeros(3, 4), over=()),
        "mean_ablate at Site('fc'): the argument over= is empty. Pass at least one of the axes (batch, feature).",
    ),
    "a reduced cache": (
        errors.EditError,
        lambda: patch_in(
            POINTS.site("relu1", row=1), run_with_cache(POINTS, *CNN.inputs(2), sites="relu1", reduce="sum")[1]
        ),
        "The cache contains Site('relu1') with shape (2, 8), but Site('relu1', row=1) needs axes (batch, channel, "
        "row, col). Record the hook point without reduce.",
    ),
    "an activation that is none": (
        errors.EditError,
        lambda: steer(POINTS.site("fc"), [1.0]),  # type: ignore[arg-type]
        "The activation for Site('fc') must be a tensor with the region's axes or an ActivationCache; got list.",
    ),
    "a cache times a tensor": (
        TypeError,
        lambda: cache() * torch.ones(4),
        "An ActivationCache can be combined only with another cache or a number; got Tensor. To combine a tensor with "
        "the activation at one site, use cache[site] * tensor.",
    ),
    "no sites": (
        errors.SiteError,
        lambda: recording(POINTS, []),
        "There are no sites to record: the argument sites= is empty. Pass at least one site, as in sites=['conv1'].",
    ),
    "a record that need not run and is none": (
        ValueError,
        lambda: recording(POINTS, ["fc", "conv1"], allow_unreached="fcc"),
        "allow_unreached must name only hook points that are recorded; got ['fcc']. Did you mean 'fc'?",
    ),
    "an axis to split along that is not there": (
        errors.SiteError,
        lambda: POINTS.site("conv1").split("chanel"),
        "Site('conv1') cannot be split along 'chanel': there is no such axis. Did you mean 'channel'? Hook point "
        "'conv1' has axes (batch, channel, row, col).",
    ),
    "a batch to split along": (
        errors.SiteError,
        lambda: POINTS.site("conv1").split("batch"),
        "Site('conv1') cannot be split along 'batch': the batch size varies between forward passes. Pass indices, or "
        "select rows with where=.",
    ),
    "a slice that ends nowhere": (
        errors.SiteError,
        lambda: POINTS.site("conv1", channel=slice(0.5, 2)),
        "Site('conv1', channel=slice(0.5, 2, None)): slice bounds must be integers.",
    ),
    "another dtype than the traced one": (
        errors.TraceMismatchError,
        lambda: run_in_bfloat16(POINTS),
        "Hook point 'fc' is torch.bfloat16 in this forward pass, but torch.float32 in the trace. Call hook_points() "
        "with the same dtype and torch.autocast settings as in this forward pass.",
    ),
    "inputs without rows": (
        errors.BatchAxisError,
        lambda: hook_points(nn.Linear(2, 2), torch.zeros(0, 2)),
        "The example inputs have no rows: the first tensor has shape (0, 2). Pass at least 2 rows, which are needed "
        "to identify the batch axis.",
    ),
    "parameters that do not exist yet": (
        errors.UnsupportedModelError,
        lambda: hook_points(nn.Sequential(nn.LazyLinear(2)), torch.zeros(2, 2)),
        "The weight '0.weight' is lazy, so its shape is unknown until the first call. Call the model once "
        "before tracing.",
    ),
    "a nested input": (
        errors.UnsupportedModelError,
        lambda: hook_points(nn.Identity(), torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)),
        "The value at hook point '.in[0]' is a nested tensor, which has no fixed shape. Pass padded inputs. If a "
        "TransformerEncoder creates nested tensors, build it with enable_nested_tensor=False.",
    ),
    "a tap with a hook point's name": (
        errors.HookPointError,
        lambda: tapped("fc.in[0]"),
        "tap('fc.in[0]', ...) has the same name as another hook point. Rename the tap.",
    ),
    "a mapping that cannot be rebuilt": (
        errors.UnsupportedModelError,
        lambda: replace(MappingProxyType({"a": torch.zeros(2)}), (Item("a"),), torch.zeros(2)),
        'The value at ["a"] in an object of type mappingproxy cannot be replaced, because the object cannot be copied '
        "(cannot pickle 'mappingproxy' object). Use a dict instead of the mappingproxy.",
    ),
    "a distribution that cannot be rebuilt": (
        errors.UnsupportedModelError,
        lambda: replace(Halved(torch.tensor([0.0, 4.0])), (Attr("logits"),), torch.zeros(2)),
        "Halved is not a torch.distributions class, so chanpatch cannot create a copy with patched parameters. Have "
        "the model return a torch.distributions class, or the parameters as tensors.",
    ),
    "a region of a sparse tensor": (
        errors.UnsupportedModelError,
        lambda: read(torch.eye(2).to_sparse(), {0: slice(0, 1)}),
        "Cannot select part of a sparse_coo tensor. Use a site without indices, or make the tensor dense in the model: "
        "tensor.to_dense().",
    ),
    "a mean over an axis that is not there": (
        errors.SiteError,
        lambda: mean_ablate(POINTS.site("fc"), torch.zeros(3, 4), over=("channel",)),
        "mean_ablate at Site('fc'): the argument over= contains ['channel'], but the axes are (batch, feature).",
    ),
    "a cache without the site": (
        errors.EditError,
        lambda: patch_in(POINTS.site("fc"), cache()),
        "The cache contains neither Site('fc') nor its whole hook point, so record one of the two. Sites in the cache: "
        "Site('relu1').",
    ),
    "a key that the cache lacks": (
        errors.HookPointError,
        lambda: cache()["fc"],
        "The cache does not contain 'fc'. Sites in the cache: Site('relu1').",
    ),
    "caches of different sites": (
        errors.SiteError,
        lambda: cache() - run_with_cache(POINTS, *CNN.inputs(2), sites="fc", stop=True),
        "Only caches with the same sites can be combined. Record these sites in both: Site('fc'), Site('relu1').",
    ),
    "a reduction that cannot tell its axes": (
        errors.SiteError,
        lambda: recording(
            hook_points(build("attention").module, torch.zeros(2, 5, 6)), ".out", reduce="sum"
        ).__enter__(),
        "reduce='sum' keeps the axes named batch, channel and feature, but Site('.out') has unnamed axes: (batch, "
        "axis1). Name these axes with hook_points(..., axes={'.out': (...)}), or pass a pair such as "
        "('b c h w -> b c', 'sum').",
    ),
    "rows without a batch axis": (
        errors.BatchAxisError,
        lambda: resample_ablate(hook_points(nn.Linear(2, 2), torch.zeros(2)).site(".out"), torch.zeros(3, 2), seed=0),
        "resample_ablate at Site('.out') needs a known batch axis. The trace could not identify the batch axis at "
        "'.out': no single axis grew when the model ran with one more input. Name the axes of the model's input: "
        "hook_points(..., axes={'.in[0]': (...)}).",
    ),
    "a patch that never ran": (
        errors.UnreachedError,
        lambda: run_branching_the_other_way("left"),
        "The patch at 'left' never ran inside patched(). Possible causes: the module was not called, its .forward() "
        "was called directly (bypassing hooks), or the module was compiled.",
    ),
    "two patches that never ran": (
        errors.UnreachedError,
        lambda: run_branching_the_other_way("left.in[0]", "left"),
        "The patches at 'left.in[0]', 'left' never ran inside patched(). Possible causes: the module was not called, "
        "its .forward() was called directly (bypassing hooks), or the module was compiled.",
    ),
    "a record that never ran": (
        errors.UnreachedError,
        record_the_other_way,
        "Nothing was recorded at 'left'. Possible causes: the module was not called, its .forward() was called "
        "directly (bypassing hooks), or the module was compiled.",
    ),
    "a twin's patch that never ran": (
        errors.UnreachedError,
        call_twin_the_other_way,
        "The patch at 'left' never ran in __call__(). Possible causes: the module was not called, its .forward() was "
        "called directly (bypassing hooks), or the module was compiled. If a patch does not have to run in every "
        "call, pass allow_unreached=['left'] to PatchedPolicy.",
    ),
    "a tap with a module's name": (
        errors.HookPointError,
        tapped,
        "tap('fc', ...) has the same name as a module. Rename the tap.",
    ),
    "no axis names that fit": (
        errors.SiteError,
        lambda: hook_points(CNN.module, *CNN.inputs(1), axes={"fc": ("batch",)}),
        "axes={'fc': ('batch',)}: hook point 'fc' has 2 axes. Pass one name per axis, without repeats. To split an "
        "axis, pass chanpatch.view(...).",
    ),
    "no forward while the context was open": (
        errors.UnreachedError,
        open_and_close,
        "The patch at 'fc' never ran inside patched(). Possible causes: the module was not called, its .forward() was "
        f"called directly (bypassing hooks), or the module was compiled. {type(CNN.module).__name__}.__call__() was "
        "not called on this model object while the context was open.",
    ),
    "no forward while it was recorded": (
        errors.UnreachedError,
        lambda: recording(BRANCHING_POINTS, "left")(print_nothing)(torch.zeros(1)),
        "Nothing was recorded at 'left'. Possible causes: the module was not called, its .forward() was called "
        "directly (bypassing hooks), or the module was compiled. Branching.__call__() was not called on this model "
        "object while the context was open.",
    ),
    "a context that was closed twice": (
        RuntimeError,
        lambda: patched(POINTS, zero_ablate(POINTS.site("fc"))).__exit__(None, None, None),
        "This context was never entered, or is already closed. Open it with a `with` statement.",
    ),
    "an index without its axis": (
        errors.SiteError,
        lambda: POINTS.site("1", 2),
        "Site('1', 2): indices must be passed by axis name, as in channel=2.",
    ),
    "an index without its axis, and without a trace": (
        errors.SiteError,
        lambda: Site("1", [2, 3], row=1),
        "Site('1', [2, 3]): indices must be passed by axis name, as in channel=2.",
    ),
    "a weight": (
        errors.HookPointError,
        lambda: POINTS.site("fc.weight"),
        "'fc.weight' is a weight, not a hook point. To create a hook point, call tap('name', weight) in forward(). (12 "
        "hook points; print the HookPoints to list them.)",
    ),
    "a weight, without a trace": (
        errors.HookPointError,
        lambda: run(CNN.module, zero_ablate(Site("fc.bias"))),
        "'fc.bias' is a weight, not a hook point. To create a hook point, call tap('name', weight) in forward(). To "
        "list all hook points, including taps, print hook_points(model, *inputs).",
    ),
    "a buffer": (
        errors.HookPointError,
        lambda: recording(nn.BatchNorm1d(2), ".running_mean"),
        "'.running_mean' is a weight, not a hook point. To create a hook point, call tap('name', weight) in forward(). "
        "To list all hook points, including taps, print hook_points(model, *inputs).",
    ),
    "one of several calls, without a trace": (
        errors.HookPointError,
        run_shared_without_a_trace,
        "'relu' has no call index, but 'relu' was called more than once in one model call. Add the call index, as in "
        "'relu#0', or trace the model with hook_points().",
    ),
    "an algorithm that holds the policy": (
        TypeError,
        lambda: hook_points(Algorithm(), *CNN.inputs(2)),  # type: ignore[arg-type]
        "hook_points expects a torch.nn.Module, not Algorithm. Pass its module .policy instead.",
    ),
    "an algorithm that holds the policy, in a context": (
        TypeError,
        lambda: PatchedPolicy(Algorithm(), zero_ablate(Site("fc"))),  # type: ignore[arg-type]
        "Expected HookPoints or a torch.nn.Module, not Algorithm. Pass its module .policy instead.",
    ),
    "an edit that names its context otherwise": (
        errors.EditError,
        lambda: edit(POINTS.site("fc"), lambda activation, ctx: activation),
        "<lambda> has a parameter `ctx`. An edit accepts the activation and, optionally, a keyword-only `context`: "
        "def function(activation, *, context).",
    ),
    "an edit that names its context otherwise, with a default": (
        errors.EditError,
        lambda: edit(POINTS.site("fc"), lambda activation, *, ctx=None: activation),
        "<lambda> has a parameter `ctx`. An edit accepts the activation and, optionally, a keyword-only `context`: "
        "def function(activation, *, context).",
    ),
    "an edit with the hook of another library": (
        errors.EditError,
        lambda: edit(POINTS.site("fc"), lambda activation, hook: activation),
        "<lambda> has a parameter `hook`. An edit accepts the activation and, optionally, a keyword-only `context`: "
        "def function(activation, *, context).",
    ),
    "a sparse tensor that is set": (
        errors.UnsupportedModelError,
        lambda: run_identity(torch.eye(2).to_sparse(), zero_ablate(Site(".out"))),
        "Patch(Site('.out'), Set) is applied to a sparse_coo tensor, which can be patched only with a custom function "
        "and without `where`. Use edit(site, function), or make the tensor dense in the model.",
    ),
    "a masked tensor that is edited in part": (
        errors.UnsupportedModelError,
        lambda: run_identity(
            masked_tensor(torch.eye(2), torch.eye(2) > 0), edit(Site(".out"), abs, where=torch.eye(2) > 0)
        ),
        "Patch(Site('.out'), abs, where=...) is applied to a masked tensor, which can be patched only with a custom "
        "function and without `where`. Use edit(site, function), or make the tensor dense in the model.",
    ),
    "a region of a masked tensor": (
        errors.UnsupportedModelError,
        lambda: read(masked_tensor(torch.eye(2), torch.eye(2) > 0), {0: slice(0, 1)}),
        "Cannot select part of a masked tensor. Use a site without indices, or make the tensor dense in the model: "
        "tensor.to_tensor(0.0).",
    ),
    "an adapter that was merged on one side": (
        errors.UnsupportedModelError,
        call_twin_of_merged,
        "'merged' is True in the policy but False in its PatchedPolicy. The two share weights but not other "
        "attributes, so set the attribute to the same value in both. If the weights changed too, for example because "
        "an adapter was merged, create a new PatchedPolicy(policy, patches) instead.",
    ),
    "a module that merges in train": (
        errors.UnsupportedModelError,
        lambda: PatchedPolicy(Merging(2, 2), zero_ablate(Site(".out"))),
        "The policy (Merging) changes its parameters in train(). A PatchedPolicy shares the policy's parameters but "
        "has its own training flags, so one of the two would run with the wrong parameters. Make the change permanent "
        "(for example, merge and remove an adapter) before creating the PatchedPolicy, or use patched().",
    ),
    "no policy": (
        errors.DistributionError,
        lambda: action_distribution(NoForward(), torch.zeros(1)),
        "NoForward has no forward(). For rollout() or action_distribution(), pass a function that returns the policy's "
        "logits or distribution, such as lambda observations: agent.actor(observations). For rollout_sweep(), pass "
        "a module whose forward() returns the logits or distribution.",
    ),
    "no distribution": (
        errors.DistributionError,
        lambda: action_distribution(lambda observations: {"q": observations}, torch.zeros(1)),
        "function returned a dict of 'q', which contains no action distribution. Expected logits of shape (batch, "
        "action), a torch.distributions object, a tuple with such an object, a pair (logits, value), or a dict with "
        "the key 'logits'. Pass a function that selects one of these from the output.",
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", MESSAGES)
def test_the_message_says_what_is_wrong_what_was_expected_and_what_to_do(name: str) -> None:
    kind, fails, message = MESSAGES[name]
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_every_error_is_public_and_has_the_base_of_all_and_a_built_in_one() -> None:
    defined = {name for name, kind in vars(errors).items() if getattr(kind, "__module__", "") == errors.__name__}
    kinds = {name: vars(errors)[name] for name in defined if isinstance(vars(errors)[name], type)}
    assert sorted(kinds) == sorted(errors.__all__)
    for name, kind in kinds.items():
        built_in = [base for base in kind.__mro__ if base.__module__ == "builtins" and issubclass(base, Exception)]
        assert issubclass(kind, errors.ChanpatchError)
        assert name == "ChanpatchError" or built_in[0] is not Exception


def test_an_output_that_turned_from_a_tuple_into_a_tensor_is_not_indexed_as_if_it_were_one() -> None:
    class Sometimes(nn.Module):
        def forward(self, vector: Tensor) -> Any:
            return (vector, vector) if vector.sum() > 0 else vector

    model = nn.Sequential(Sometimes())
    points = hook_points(model, torch.ones(2, 2))
    with pytest.raises(errors.TraceMismatchError) as caught, patched(points, zero_ablate(points.site("0.out[0]"))):
        model(-torch.ones(2, 2))
    assert str(caught.value) == (
        "Expected a tensor at '0.out[0]' in this forward pass; got NoneType in Tensor. Call hook_points() "
        "with inputs like the ones in this forward pass, and use the names that it lists."
    )


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda points, cache: points.site("1", chanel=3), "did you mean 'channel'?"),
        (lambda points, cache: run_with_cache(points, X, sites="1", reduce="sums"), "Did you mean 'sum'?"),
        (lambda points, cache: mean_ablate(points.site("1"), cache, over="bach"), "Did you mean 'batch'?"),
        (lambda points, cache: cache["11"], "Did you mean '1'?"),
        (lambda points, cache: swept(points).effect("flip"), "Did you mean 'flips'?"),
        (lambda points, cache: hook_points(points.model, X, method="forwart"), "Did you mean 'forward'?"),
        (lambda points, cache: points.select("*.im[0]"), "Did you mean '.in[0]'?"),
    ],
)
def test_a_near_name_is_suggested(mistake, hint):
    points = hook_points(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), X)
    _, cache = run_with_cache(points, X, sites="1")
    with pytest.raises(ChanpatchError) as caught:
        mistake(points, cache)
    assert hint in str(caught.value)


X = torch.zeros(2, 3, 4, 4)


def swept(points):
    metrics = {"flips": lambda output: output[:, 0, 0, 0], "difference": lambda output: output[:, 1, 0, 0]}
    return sweep(points, X, patches=[zero_ablate(points.site("1", channel=0))], metric=metrics)
