"""On another device than the CPU everything lies there, is refused where it does not, and gives the CPU's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from models import MODELS, build
from second_device import DEVICE, second_device

from chanpatch import (
    PatchedPolicy,
    channel_sums,
    contrast,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    resample_ablate,
    run_with_cache,
    steer,
    sweep,
    zero_ablate,
)
from chanpatch._tree import leaves
from chanpatch.attribution import attribution
from chanpatch.errors import ChanpatchError


def numbers(output):
    """The first tensor of an output."""
    return next(tensor for _, tensor in leaves(output))


def metric(output):
    return numbers(output).flatten(1)[:, 0]


def measured(module, inputs, name):
    """What the library's functions give for a model, by function."""
    points = hook_points(module, *inputs)
    site = points.site(name)
    axis = next(axis for axis in points[name].axes if axis in ("channel", "feature"))
    one = site.split(axis)[1]
    _, cache = run_with_cache(points, *inputs, sites=[name])
    vector = torch.ones_like(cache[name][:1])
    others = {
        "zero": zero_ablate(one),
        "mean": mean_ablate(site, cache),
        "resample": resample_ablate(site, cache, seed=0),
        "patch in": patch_in(site, cache[name].flip(0)),
        "steer": steer(site, vector.to(points[name].device)),
    }
    found = {"record": cache[name], "sum": run_with_cache(points, *inputs, sites=[name], reduce="sum", stop=True)[name]}
    with torch.no_grad():
        for verb, patch in others.items():
            with patched(points, patch):
                found[verb] = numbers(module(*inputs))
            found[f"{verb}, twin"] = numbers(PatchedPolicy(points, patch)(*inputs))
    patches = {part: zero_ablate(part) for part in site.split(axis)[:3]}
    found["sweep"] = torch.tensor(sweep(points, *inputs, patches=patches, metric=metric).effect())
    found["attribution"] = torch.tensor(attribution(points, *inputs, patches=patches, metric=metric).effect)
    if len(inputs) == 1:
        (batch,) = inputs
        found["sums"] = torch.as_tensor(channel_sums(points, batch, name))
        differences = contrast(points, batch, batch.flip(0), [name])
        found["contrast"] = torch.tensor([row["effect"] for row in differences.to_records()])
    return found


# An LSTM would run a fused operation there that torch has for accelerators alone.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm_policy"])
def test_every_function_gives_the_cpus_numbers(name):
    module, inputs, site = build(name)
    given = inputs(4)
    expected = measured(module, given, site)
    with second_device():
        found = measured(copy.deepcopy(module).to(DEVICE), tuple(each.to(DEVICE) for each in given), site)
        assert found["record"].device == found["zero"].device == found["zero, twin"].device == DEVICE
        for what, tensor in expected.items():
            torch.testing.assert_close(found[what].cpu(), tensor, rtol=0, atol=0, msg=what)


def test_a_record_goes_to_the_device_that_was_asked_for():
    module, inputs, site = build("plain_cnn")
    with second_device():
        batch = inputs(4)[0].to(DEVICE)
        _, cache = run_with_cache(module.to(DEVICE), batch, sites=[site], device="cpu")
    assert cache[site].device == torch.device("cpu")


def test_an_operand_on_the_wrong_device_is_refused_with_both_named():
    module, inputs, site = build("plain_cnn")
    with second_device():
        batch = inputs(4)[0].to(DEVICE)
        points = hook_points(module.to(DEVICE), batch)
        with pytest.raises(ChanpatchError, match=r"on cpu, but the region is torch\.float32 on simulated:0") as caught:
            with patched(points, patch_in(points.site(site), torch.zeros(4, *points[site].shape))):
                module(batch)
    assert "value.to('simulated:0', torch.float32)" in str(caught.value)
