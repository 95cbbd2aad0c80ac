"""The patterns of hook points: one grammar for `select`, `sites=`, `axes=` and keys of a cache."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from chanpatch import contrast, hook_points, recording, run_with_cache, tap
from chanpatch.errors import HookPointError, SiteError
from chanpatch.probes import channel_sums
from chanpatch.registry import HookPoints


class Attention(nn.Module):
    """Returns a tuple, has a child called `out`, and taps its pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, stream: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pattern = tap("pattern", stream.softmax(-1))
        return self.out(stream * pattern), pattern


class Block(nn.Module):
    """Returns a tuple of one tensor, as GPT-2's does."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Sequential(OrderedDict(up=nn.Linear(4, 4), act=nn.Tanh()))

    def forward(self, stream: Tensor) -> tuple[Tensor]:
        stream = stream + self.attn(stream, scale=stream)[0]
        return (stream + self.mlp(self.mlp(stream)),)


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.h2, self.ln_f = nn.Identity(), nn.LayerNorm(4)

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.h:
            (stream,) = block(stream)
        return self.ln_f(self.h2(stream))


INPUT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
MODEL = Transformer(12)
POINTS = hook_points(MODEL, INPUT)
BLOCKS = [f"h.{number}.out[0]" for number in range(12)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("h.*", BLOCKS),
        ("h.*.out[0]", BLOCKS),
        ("h.*.out[*]", BLOCKS),
        ("h.*.out", [f"h.{number}.out[0]" for number in range(12)]),
        ("h.*.in[0]", [f"h.{number}.in[0]" for number in range(12)]),
        ("h.*.attn", [f"h.{number}.attn.out[{part}]" for number in range(12) for part in (0, 1)]),
        ("h.*.attn.out[1]", [f"h.{number}.attn.out[1]" for number in range(12)]),
        ("h.*.attn.out", [f"h.{number}.attn.out" for number in range(12)]),  # the module of that name
        ("h.*.attn.in[*]", [f'h.{number}.attn.in{item}' for number in range(12) for item in ("[0]", '["scale"]')]),
        ('h.3.attn.in["s*"]', ['h.3.attn.in["scale"]']),
        ("h.*.mlp", [f"h.{number}.mlp#{call}" for number in range(12) for call in (0, 1)]),
        ("h.*.mlp#1", [f"h.{number}.mlp#1" for number in range(12)]),
        ("h.*.mlp#1.in", [f"h.{number}.mlp#1.in[0]" for number in range(12)]),
        ("h.11.*", ["h.11.attn.out[0]", "h.11.attn.out[1]", "h.11.mlp#0", "h.11.mlp#1"]),
        ("h.11.mlp.**", [f"h.11.mlp{child}#{call}" for child in (".up", ".act", "") for call in (0, 1)]),
        ("**.11.**.act#0", ["h.11.mlp.act#0"]),
        ("h.??", BLOCKS[10:]),
        ("h.1?", BLOCKS[10:]),
        ("?n_f", ["ln_f"]),
        ("h*", ["h2"]),
        ("*", [f"pattern#{number}" for number in range(12)] + ["h2", "ln_f"]),
        ("**.h2", ["h2"]),
        ("pattern#1*", ["pattern#1", "pattern#10", "pattern#11"]),
        (".in[*]", [".in[0]"]),
        (".out", [".out"]),
    ],
)  # fmt: skip
def test_a_pattern_selects_in_execution_order(pattern: str, names: list[str]) -> None:
    assert sorted(POINTS.select(pattern), key=[*POINTS].index) == [*POINTS.select(pattern)]
    assert sorted(POINTS.select(pattern)) == sorted(names)


def test_two_stars_are_every_output_and_two_stars_with_in_are_every_input() -> None:
    assert [*POINTS.select("**")] == [point.name for point in POINTS.values() if point.side != "in"]
    assert [*POINTS.select("**.in")] == [point.name for point in POINTS.values() if point.side == "in"]


@pytest.mark.parametrize(
    "pattern", ["h", "h.*.up", "h.*.*.*.*", "*.in[0]x", "h.0.in[1]", "*.act", "h.*#0", "h.*.", "attn*"]
)
def test_a_pattern_crosses_no_part_and_adds_none(pattern: str) -> None:
    with pytest.raises(HookPointError, match="No hook point matches"):
        POINTS.select(pattern)


def test_a_star_takes_no_input_of_the_model_itself() -> None:
    assert ".in[0]" not in POINTS.select("*.in[0]")
    assert ".in[0]" in POINTS.select("**.in[0]")


MESSAGES: dict[str, tuple[Any, str]] = {
    "blocks": (
        lambda: POINTS.select("h.?"),
        "'h.?' does not match h.10.out[0], h.11.out[0], because '?' matches exactly one character. Use 'h.*' to "
        "include these hook points, or pass a list of names.",
    ),
    "calls": (
        lambda: POINTS.select("pattern#?"),
        "'pattern#?' does not match pattern#10, pattern#11, because '?' matches exactly one character. Use "
        "'pattern#*' to include these hook points, or pass a list of names.",
    ),
    "many": (
        lambda: run_with_cache(POINTS, INPUT, sites=["ln_f", "h.?.mlp.**#0"]),
        "'h.?.mlp.**#0' does not match h.10.mlp.up#0, h.10.mlp.act#0, h.10.mlp#0, h.11.mlp.up#0, h.11.mlp.act#0, "
        "h.11.mlp#0, because '?' matches exactly one character. Use 'h.*.mlp.**#0' to include these hook points, or "
        "pass a list of names.",
    ),
    "more": (
        lambda: hook_points(MODEL, INPUT, axes={"h.?.**": ("batch", "feature")}),
        "'h.?.**' does not match h.10.attn.out, h.10.attn.out[0], h.10.attn.out[1], h.10.mlp.up#0, h.10.mlp.act#0, "
        "h.10.mlp#0, ... (20 in all), because '?' matches exactly one character. Use 'h.*.**' to include these hook "
        "points, or pass a list of names.",
    ),
    "a misspelt part": (
        lambda: POINTS.select("h.*.attm.out[0]"),
        "No hook point matches 'h.*.attm.out[0]'. Did you mean 'h.9.attn.out[0]'? `*` stops at a dot; `**` does not. "
        "(258 hook points; print the HookPoints to list them.)",
    ),
    "a star for several parts": (
        lambda: POINTS.select("*.act"),
        "No hook point matches '*.act'. '**.act' would match 24 hook points: `*` stops at a dot; `**` does not. (258 "
        "hook points; print the HookPoints to list them.)",
    ),
    "a call of a module that is called once": (
        lambda: POINTS.select("h.*#0"),
        "No hook point matches 'h.*#0'. 'h.*' would match 12 hook points: a module that is called once has no call "
        "index. (258 hook points; print the HookPoints to list them.)",
    ),
    "a star for several parts in axes": (
        lambda: hook_points(MODEL, INPUT, axes={"*.act": ("batch", "feature")}),
        "axes={'*.act': ...}: no hook point matches this pattern. '**.act' would match 24 hook points: `*` stops at "
        "a dot; `**` does not.",
    ),
    "a pattern without the parents of its modules": (
        lambda: POINTS.select("mlp.act"),
        "No hook point matches 'mlp.act'. '**.mlp.act' would match 24 hook points: `**.` matches modules inside other "
        "modules. (258 hook points; print the HookPoints to list them.)",
    ),
    "a misspelt part in axes": (
        lambda: hook_points(MODEL, INPUT, axes={"h.*.attm": ("batch", "feature")}),
        "axes={'h.*.attm': ...}: no hook point matches this pattern. Did you mean 'h.9.attn.out'?",
    ),
    "a pattern as the name of one": (
        lambda: POINTS.site("h.*", feature=0),
        "'h.*' is a pattern, but a hook point is expected. Use a name from points.select('h.*').",
    ),
    "a pattern for a bare model": (
        lambda: recording(MODEL, "h.*").__enter__(),
        "'h.*' is a pattern, but an untraced model has no list of hook points to match. Pass hook_points(model, "
        "*inputs) instead of the model.",
    ),
    "a pattern of several where one is expected": (
        lambda: channel_sums(POINTS, INPUT, "h.1?"),
        "Expected one site, but got 2: Site('h.10.out[0]'), Site('h.11.out[0]'). Pass one of these sites.",
    ),
    "a pattern of several in a cache": (
        lambda: run_with_cache(POINTS, INPUT, sites="h.1?", stop=True)["h.*"],
        "The cache contains 2 sites at 'h.*'; pass one site. Sites in the cache: "
        "Site('h.10.out[0]'), Site('h.11.out[0]').",
    ),
    "a pattern of none in a cache": (
        lambda: run_with_cache(POINTS, INPUT, sites="h.1?", stop=True)["h.1*.out[1]"],
        "The cache does not contain 'h.1*.out[1]'. Did you mean 'h.11.out[0]'? Sites in the cache: "
        "Site('h.10.out[0]'), Site('h.11.out[0]').",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MESSAGES)
def test_the_message_of_a_pattern_names_what_it_leaves_out_or_misses(fault: str) -> None:
    fails, message = MESSAGES[fault]
    with pytest.raises((HookPointError, SiteError)) as caught:
        fails()
    assert str(caught.value) == message


def test_a_question_mark_may_leave_out_what_is_no_longer_number() -> None:
    small = hook_points(Transformer(3), INPUT)
    assert [*small.select("h.?")] == BLOCKS[:3]
    assert [*small.select("l?_f")] == ["ln_f"]


def test_sites_in_a_recording_take_patterns_among_names() -> None:
    for sites in ("h.*", ["h.*", "h.3.out[0]"], POINTS.select("h.*")):
        cache = run_with_cache(POINTS, INPUT, sites=sites, stop=True)
        assert [site.name for site in cache] == BLOCKS
    with recording(POINTS, ["ln_f", "h.*.in[0]"]) as cache:
        MODEL(INPUT)
    assert [site.name for site in cache] == [*(f"h.{number}.in[0]" for number in range(12)), "ln_f"]


def test_a_contrast_takes_a_pattern() -> None:
    result = contrast(POINTS, INPUT, -INPUT, "h.*")
    assert list(dict.fromkeys(site.name for site in result.sites)) == BLOCKS


def test_a_cache_takes_a_pattern_of_one_site_with_and_without_a_trace() -> None:
    for model in (POINTS, MODEL):
        cache = run_with_cache(model, INPUT, sites=["h.3.out[0]", "h.3.in[0]", "ln_f"], stop=True)
        assert cache["h.*"] is cache["h.3.out[0]"]
        assert cache["**.in"] is cache["h.3.in[0]"]
        assert cache["*"] is cache["ln_f"]
        assert "h.*.mlp" not in cache


def test_axes_of_a_pattern_name_shared_modules_by_every_name_and_every_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([Opaque()])
            self.second = nn.ModuleList([Opaque(), self.first[0]])

        def forward(self, vector: Tensor) -> Tensor:
            return self.first[0](self.second[0](self.second[1](vector)))

    points = hook_points(Shared(), torch.randn(2, 3), axes={"second.*": ("batch", "angle")})
    assert {point.axes for point in points.select("**.?").values()} == {("batch", "angle")}
    assert len(points.select("second.*")) == 3


class Opaque(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return torch.fft.fft(vector).real


class Pair(NamedTuple):
    logits: Tensor
    parts: dict[str, Tensor]


class Nested(nn.Module):
    """Nested outputs with dots and brackets in their keys, and taps with dots in brackets."""

    def forward(self, vector: Tensor) -> Pair:
        for scale in (0.5, 1.5):
            tap(f"scaled[{scale}]", vector * scale)
        return Pair(vector + 1, {"a.b": vector + 2, "[c]": vector + 3})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("f", ["f.out.logits", 'f.out.parts["a.b"]', 'f.out.parts["[c]"]']),
        ("f.out.parts", ['f.out.parts["a.b"]', 'f.out.parts["[c]"]']),
        ("f.out.parts[*]", ['f.out.parts["a.b"]', 'f.out.parts["[c]"]']),
        ('f.out.parts["a*"]', ['f.out.parts["a.b"]']),
        ('f.out.parts["[?]"]', ['f.out.parts["[c]"]']),
        ("f.out.l*", ["f.out.logits"]),
        ("*[*]", ["scaled[0.5]", "scaled[1.5]"]),
        ("scaled[0.*]", ["scaled[0.5]"]),
    ],
)
def test_a_pattern_ends_no_part_inside_brackets(pattern: str, names: list[str]) -> None:
    points = hook_points(Around(), torch.randn(2, 3))
    assert [*points.select(pattern)] == names


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Nested()

    def forward(self, vector: Tensor) -> Tensor:
        return self.f(vector).logits


def test_a_wildcard_in_a_name_that_exists_means_itself() -> None:
    class Asks(nn.Module):
        def forward(self, vector: Tensor) -> Tensor:
            return tap("why?", vector) + tap("whyx", vector)

    points: HookPoints = hook_points(Asks(), torch.randn(2, 3))
    assert [*points.select("why?")] == ["why?"]
    assert [*points.select("why*")] == ["why?", "whyx"]
    cache = run_with_cache(points, torch.randn(2, 3), sites="why?", stop=True)
    assert cache["why?"].shape == (2, 3)


def test_the_end_of_a_name_is_enough_for_a_suggestion() -> None:
    model = nn.ModuleDict({"embedder": nn.ModuleDict({"relu3": nn.ReLU(), "relu2": nn.ReLU()})})
    model.forward = lambda inputs: model["embedder"]["relu3"](model["embedder"]["relu2"](inputs))  # type: ignore
    points = hook_points(model, torch.zeros(2, 3))
    with pytest.raises(HookPointError, match="No hook point named 'relu3'. Did you mean 'embedder.relu3'?"):
        points.site("relu3")
