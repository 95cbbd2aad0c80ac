"""Whole sweeps against hand-written code: hooks in a loop, or the floor, which runs the prefix once.

Every round times both, one after the other, in CPU time of the thread and without the garbage collector.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from chanpatch import hook_points, sweep, zero_ablate
from chanpatch.patching import Patch

ROUNDS = 9


class Comparison(NamedTuple):
    """Code by hand and the sweep, which return the same numbers, and how many times as long the sweep may take."""

    by_hand: Callable[[], Tensor]
    swept: Callable[[], Any]
    target: float


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(width, width), nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.relu(self.linear(hidden))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.mixed = heads, nn.Linear(width, 3 * width), nn.Identity()
        self.join = nn.Linear(width, width)

    def mix(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2), (key, value)

    def forward(self, hidden: Tensor, cache: Any = None) -> Tensor:
        mixed, keys = self.mix(hidden)
        if cache is not None:
            cache.layers.append(keys)
        joined: Tensor = self.join(self.mixed(mixed))
        return joined


class Layer(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, cache: Any = None) -> Tensor:
        return self.after(hidden, self.attention(self.norm1(hidden), cache))

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + attended
        return hidden + self.mlp(self.norm2(hidden))


class Cache:
    """Keys and values of each layer, in an object in which chanpatch finds no tensors."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []


class Llama(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(100, width), nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, tokens: Tensor, *, use_cache: bool = True) -> dict[str, Any]:
        hidden, cache = self.embed(tokens), Cache() if use_cache else None
        for layer in self.layers:
            hidden = layer(hidden, cache)
        output = {"logits": self.head(self.norm(hidden))}
        return output if cache is None else {**output, "past_key_values": cache}


def looped(model: nn.Module, inputs: Any, keywords: Any, patches: list[Patch], metric: Any) -> Tensor:
    """Hooks by hand: one forward per patch, each with a hook that sets a region to zero."""
    values = []
    for patch in patches:
        point = patch.site.point
        index = [slice(None)] * len(point.axes)
        for axis, chosen in patch.site.indices:
            index[point.axes.index(axis)] = [*chosen]
        index = tuple(index)

        def hook(module, args, output, index=index):
            output = output.clone()
            output[index] = 0.0
            return output

        handle = model.get_submodule(point.module).register_forward_hook(hook)
        try:
            values.append(metric(model(*inputs, **keywords)))
        finally:
            handle.remove()
    return torch.stack(values)


def against_the_loop(model, inputs, sites, target, metric, **keywords) -> Comparison:
    model.eval()
    points = hook_points(model, *inputs, **keywords)
    patches = [zero_ablate(site) for site in sites(points)]
    by_hand = lambda: looped(model, inputs, keywords, patches, metric)  # noqa: E731
    swept = lambda: sweep(points, *inputs, patches=patches, metric=metric, progress=False, **keywords)  # noqa: E731
    return Comparison(by_hand, swept, target)


def first(output: Tensor) -> Tensor:
    return output[:, 0]


def first_mean(output: Tensor) -> Tensor:
    return output[:, -1].mean(-1)


def last_logit(output: dict[str, Tensor]) -> Tensor:
    return output["logits"][:, -1, 0]


def blocks(count: int, target: float) -> Comparison:
    model = nn.Sequential(*(Block(64) for _ in range(count)), nn.Linear(64, 4))
    return against_the_loop(
        model, (torch.randn(16, 64),), lambda p: [p.site(str(n), feature=n % 64) for n in range(count)], target, first
    )


def layers(width: int, target: float) -> Comparison:
    model = nn.Sequential(*(Layer(width) for _ in range(12)))
    return against_the_loop(
        model, (torch.randn(16, 16, width),), lambda p: [p.site(str(n)) for n in range(12)], target, first_mean
    )


def llama(use_cache: bool, target: float) -> Comparison:
    def sites(points):
        named = [f"layers.{n}" for n in range(12)]
        return [points.site(name, **{points[name].axes[1]: p}) for name in named for p in range(16)]

    tokens = torch.randint(100, (4, 16))
    return against_the_loop(Llama(12, 256), (tokens,), sites, target, last_logit, use_cache=use_cache)


def tiny(target: float) -> Comparison:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    return against_the_loop(model, (torch.randn(16, 8),), lambda p: p.site("1").split("feature"), target, first)


def heads(target: float) -> Comparison:
    """Each head at each position of the first of two layers, over the floor."""
    model, inputs = nn.Sequential(Layer(64), Layer(64)).eval(), torch.randn(8, 32, 64)
    points = hook_points(model, inputs)
    name = "0.attention.mixed"
    _, position, feature = points[name].axes
    regions = [(p, slice(16 * h, 16 * h + 16)) for h in range(4) for p in range(32)]
    patches = [zero_ablate(points.site(name, **{position: p, feature: f})) for p, f in regions]

    def floor():
        layer, values = model[0], []
        mixed, _ = layer.attention.mix(layer.norm1(inputs))
        for p, f in regions:
            changed = mixed.clone()
            changed[:, p, f] = 0.0
            values.append(first_mean(model[1](layer.after(inputs, layer.attention.join(changed)))))
        return torch.stack(values)

    return Comparison(floor, lambda: sweep(points, inputs, patches=patches, metric=first_mean, progress=False), target)


def features(target: float) -> Comparison:
    """128 features after the convolutions of a policy for Atari."""
    convolutions = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3)]
    model = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6))
    return against_the_loop(
        model, (torch.rand(32, 4, 84, 84),), lambda p: [p.site("8", feature=n) for n in range(128)], target, first
    )


def pairs(target: float) -> Comparison:
    """Pairs of channels at two convolutions, over the floor."""
    convolutions = [each for n in (3, 16, 16) for each in (nn.Conv2d(n, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 256, 4)).eval()
    inputs = torch.randn(4, 3, 16, 16)
    points = hook_points(model, inputs)
    chosen = [(one, other) for one in range(16) for other in range(0, 16, 4)]
    patches = {
        pair: [zero_ablate(points.site(name, channel=n)) for name, n in zip("35", pair, strict=True)] for pair in chosen
    }

    def floor():
        clean, values = model[:4](inputs), []
        for one, other in chosen:
            changed = clean.clone()
            changed[:, one] = 0.0
            later = model[4:6](changed)
            later[:, other] = 0.0
            values.append(first(model[6:](later)))
        return torch.stack(values)

    return Comparison(floor, lambda: sweep(points, inputs, patches=patches, metric=first, progress=False), target)


def auto(name: str) -> Comparison:
    """Eight patches with `auto`, over `strategy="loop"`."""
    models = {
        "convolutions": (
            nn.Sequential(
                *(nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16, 16)), nn.Flatten(), nn.Linear(16384, 4)
            ),
            (torch.randn(16, 3, 32, 32),),
            lambda p: p.site("0", channel=slice(0, 8)).split("channel"),
            first,
        ),
        "policy": (
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
            (torch.randn(1, 8),),
            lambda p: p.site("1", feature=slice(0, 8)).split("feature"),
            first,
        ),
        "layers": (
            nn.Sequential(*(Layer(256) for _ in range(3))),
            (torch.randn(16, 32, 256),),
            lambda p: [p.site("0", **{p["0"].axes[1]: n}) for n in range(8)],
            first_mean,
        ),
        "last layers": (
            nn.Sequential(*(Layer(64) for _ in range(8))),
            (torch.randn(16, 16, 64),),
            lambda p: [p.site(str(n)) for n in range(8)],
            first_mean,
        ),
    }
    model, inputs, sites, metric = models[name]
    points = hook_points(model.eval(), *inputs)
    patches = [zero_ablate(site) for site in sites(points)]
    swept = dict(patches=patches, metric=metric, progress=False)
    looped = lambda: torch.from_numpy(sweep(points, *inputs, strategy="loop", **swept).values[metric.__name__])  # noqa: E731
    return Comparison(looped, lambda: sweep(points, *inputs, **swept), 1.05)


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    "one patch in each of 12 blocks": lambda: blocks(12, 0.8),
    "one patch in each of 48 blocks": lambda: blocks(48, 0.3),
    "one patch in each of 96 blocks": lambda: blocks(96, 0.2),
    "one patch in each of 200 blocks": lambda: blocks(200, 0.2),
    "12 transformer layers, width 64": lambda: layers(64, 0.8),
    "12 transformer layers, width 256": lambda: layers(256, 0.8),
    "positions x layers, with a cache": lambda: llama(True, 0.4),
    "positions x layers, without a cache": lambda: llama(False, 0.4),
    "32 channels of a tiny policy": lambda: tiny(1.0),
    "heads x positions, over the floor": lambda: heads(1.1),
    "128 features of an Atari policy": lambda: features(0.1),
    "pairs of channels, over the floor": lambda: pairs(1.3),
    **{
        f"auto over the loop: {name}": (lambda name=name: auto(name))
        for name in ("convolutions", "policy", "layers", "last layers")
    },  # fmt: skip
}


def seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        function()
        return time.thread_time() - start
    finally:
        gc.enable()


def measured(name: str, rounds: int = ROUNDS) -> tuple[float, Any, float]:
    """The ratio of the medians, the groups of the sweep, and the target."""
    torch.manual_seed(0)
    by_hand, swept, target = COMPARISONS[name]()
    expected, result = by_hand(), swept()
    np.testing.assert_allclose(*[each for each in (*result.values.values(), expected.numpy())], rtol=1e-4, atol=1e-4)
    taken = np.array([(seconds(swept), seconds(by_hand)) for _ in range(rounds)])
    return float(np.divide(*np.median(taken, axis=0))), result.groups, target


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_sweep_is_as_fast_as_code_by_hand_or_faster(name, one_thread):
    ratio, groups, target = measured(name)
    strategies = ", ".join(dict.fromkeys(group.strategy for group in groups))
    print(f"\n{name:44} {ratio:5.2f}, target {target} ({strategies})")
    assert ratio <= target


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


FIRST = """
import sys
import torch
from torch import nn
from chanpatch import hook_points, sweep, zero_ablate

model, inputs = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(16, 8)
points = hook_points(model, inputs)
patches = [zero_ablate(site) for site in points.site("1").split("feature")]
sweep(points, inputs, patches=patches, metric=lambda output: output[:, 0])
print("torch._dynamo" in sys.modules)
"""


def test_the_first_sweep_of_a_process_does_not_import_dynamo():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
