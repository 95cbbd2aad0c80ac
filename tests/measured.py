"""What the library's functions give for a model, to be compared between devices."""

from __future__ import annotations

import torch

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
from chanpatch.engine.paths import leaves
from chanpatch.sweeps import attribution


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
    found["attribution"] = torch.tensor(attribution(points, *inputs, patches=patches, metric=metric).effect())
    if len(inputs) == 1:
        (batch,) = inputs
        found["sums"] = torch.as_tensor(channel_sums(points, batch, name))
        differences = contrast(points, batch, batch.flip(0), [name])
        found["contrast"] = torch.tensor([row["effect"] for row in differences.to_records()])
    return found
